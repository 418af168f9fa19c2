"""Stop strings in a text that comes in pieces.

A piece is held back as long as it may be the start of a stop string, so what was given never has
to be taken back. What is found depends on the characters alone, not on how they came in pieces.
Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for the first of several strings to be complete; of two at once, the longer.

    The text before the string is given, the string itself only with `include`. Each string is
    followed by its own automaton (Knuth, Morris & Pratt 1977): constant work for a character and a
    string, whatever the strings are.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False):
        self._include = include
        self._searches = [_Search(string) for string in sorted(set(strings), key=len, reverse=True)]
        self._held = ""

    def feed(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Take a piece; give the text that is certain, and the stop string if it is complete.

        Not `armed`, complete strings are passed over. After a stop string nothing may be fed.
        """
        if not self._searches or not text:
            return text, None
        self._held += text
        start = len(self._held) - len(text)
        for end, char in enumerate(text, start + 1):
            found = [search for search in self._searches if search.take(char)]
            if found and armed:
                stop = found[0].string
                return self._held[: end if self._include else end - len(stop)], stop
        longest_start = 0 if self._include else max(search.depth for search in self._searches)
        certain = len(self._held) - longest_start
        given, self._held = self._held[:certain], self._held[certain:]
        return given, None

    def flush(self) -> str:
        """Give what is held back: the text ended and no stop string came of it."""
        held, self._held = self._held, ""
        return held


class _Search:
    """One string's automaton: `depth` characters of it are the end of the text so far."""

    __slots__ = ("_fallback", "depth", "string")

    def __init__(self, string: str):
        self.string = string
        self.depth = 0
        self._fallback = [0, 0]
        """[k]: the longest proper start of the string that also ends its first k characters."""
        for char in string[1:]:
            depth = self._fallback[-1]
            while depth and string[depth] != char:
                depth = self._fallback[depth]
            self._fallback.append(depth + (string[depth] == char))

    def take(self, char: str) -> bool:
        """Go on by one character; whether the string is complete with it."""
        while self.depth and self.string[self.depth] != char:
            self.depth = self._fallback[self.depth]
        self.depth += self.string[self.depth] == char
        if self.depth < len(self.string):
            return False
        self.depth = self._fallback[self.depth]
        return True
