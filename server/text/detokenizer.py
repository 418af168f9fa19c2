"""Tokens to text as they come, in whole characters.

Fed token by token, the texts joined (`flush` included) are what decoding all tokens at once gives,
and the whole cost is linear. What comes out depends on the tokens alone, never on how they are
grouped in time. Knows nothing of stop strings.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from server.text.tokenizer import Tokenizer


class Detokenizer(Protocol):
    """One output's text so far."""

    def push(self, token_id: int) -> str:
        """Give the characters that this token completes; often all of its own, maybe none."""

    def flush(self) -> str:
        """Give what is left at the end: broken characters as U+FFFD."""


def detokenizer_for(tokenizer: Tokenizer) -> Detokenizer:
    """Give the cheapest one that is exact for this tokenizer."""
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer)
    return WindowDetokenizer(tokenizer)


class ByteDetokenizer:
    """For byte-level BPE (GPT-2, Llama 3, Qwen): tokens are bytes and the text is their UTF-8."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """See `Detokenizer.push`."""
        if self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other tokenizer: decode a short window, and give what is new in it.

        ... | context | held |        context: the last tokens that gave text
            ^ _start  ^ _read         held: tokens whose text is still open

    The context keeps the decoder from treating held tokens as the start of a text, where
    SentencePiece drops a space. A run of byte tokens is held to its end: the decoder reads a run
    whole, and one bad byte in it changes the text of the bytes before.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """See `Detokenizer.push`."""
        if self._tokenizer.is_silent(token_id):
            return ""
        self._held.append(token_id)
        if self._tokenizer.is_byte_token(token_id):
            return ""
        return self._release()

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        return self._release() if self._held else ""

    def _release(self) -> str:
        text = self._tokenizer.decode(self._context + self._held)
        new = text[len(self._context_text) :]
        if new:  # else the context alone could look like the start of a text
            self._context, self._held = self._held, []
            self._context_text = self._tokenizer.decode(self._context)
        return new
