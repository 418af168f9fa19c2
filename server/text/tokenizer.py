"""Text to token ids and back, by a checkpoint's `tokenizer.json`.

The only module that imports `tokenizers`. Knows nothing of chats, stop strings or requests.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import tokenizers

from kvpaging.base.errors import ConfigError

LONG_TEXT_CHARS: Final = 4096
"""Longer texts are encoded in a thread (a few milliseconds of work), so that streams go on."""

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """A `tokenizer.json`. Immutable, and safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, *, bos_token_id: int | None = None):
        """Use `backend`; `bos_token_id` is put before a prompt where `backend` puts nothing."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._bos_token_id = bos_token_id
        self._special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        self._decoders = _flat_decoders(backend)
        _remember_no_words(backend)

    @classmethod
    def load(
        cls, path: Path, *, bos_token: str | None = None, add_bos_token: bool | None = None
    ) -> Self:
        """Read `tokenizer.json`. Raises `ConfigError`.

        What its post-processor adds to a prompt stands. Where it adds nothing and the checkpoint
        asks for `add_bos_token`, as old Llama files do, `bos_token` is put before each prompt.
        """
        if not path.is_file():
            raise ConfigError(f"{path} is missing: a checkpoint needs its tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare `Exception`
            raise ConfigError(f"{path} is not a tokenizer: {error}") from error
        bos_token_id = None
        if add_bos_token and bos_token is not None and not backend.encode("").ids:
            bos_token_id = backend.token_to_id(bos_token)
        return cls(backend, bos_token_id=bos_token_id)

    @property
    def vocab_size(self) -> int:
        """Tokens with a text, added ones included. The model may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def max_token_chars(self) -> int:
        """The characters of the longest token: no text of so many times `n` has only `n` tokens.

        But for what a normalizer takes away; no prompt that anybody means is near this bound.
        """
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    @cached_property
    def is_byte_level(self) -> bool:
        """Each token is a string of bytes, independent of its neighbours."""
        kinds = [decoder["type"] for decoder in self._decoders]
        return "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}

    @cached_property
    def has_byte_tokens(self) -> bool:
        """Tokens such as `<0xE4>` stand for single bytes, and runs of them are read together."""
        return any(decoder["type"] == "ByteFallback" for decoder in self._decoders)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Give the text's ids; with what the tokenizer puts around a prompt, or without.

        A chat template writes its own special tokens: its output is encoded without.
        """
        # Of a batch, since only then the library lets go of the GIL while it works; "fast" leaves
        # out the places in the text.
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        if add_special_tokens and self._bos_token_id is not None:
            ids.insert(0, self._bos_token_id)
        return ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Do `encode`, in a thread where it takes long."""
        if len(text) <= LONG_TEXT_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def spans(self, text: str) -> list[tuple[int, int, int]]:
        """Give (id, start, end) of each token of the text alone, in characters."""
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)  # without GIL
        return [(i, *span) for i, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Give the text of these ids; broken UTF-8 becomes U+FFFD, unknown ids nothing."""
        if len(token_ids) <= LONG_TEXT_CHARS:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        batch = self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        text: str = batch[0]  # of a batch for the same reason as in `encode`
        return text

    def is_silent(self, token_id: int) -> bool:
        """Whether the token is special, or has no text at all (a padding row of the model)."""
        return token_id in self._special_ids or self._backend.id_to_token(token_id) is None

    def is_special(self, token_id: int) -> bool:
        """Whether the token is no part of the text, such as an end-of-text mark."""
        return token_id in self._special_ids

    def is_byte_token(self, token_id: int) -> bool:
        """Whether the token is one raw byte of a character, where the tokenizer has such tokens."""
        if not self.has_byte_tokens:
            return False
        return _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "") is not None

    def token_bytes(self, token_id: int) -> bytes:
        """Give the bytes that this token stands for by itself; a special token's are its name."""
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            return _byte_level_bytes(token)
        if self.has_byte_tokens and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        """Give the text of one token by itself, for lists of tokens and log-probabilities."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


def _remember_no_words(backend: tokenizers.Tokenizer) -> None:
    """Keep no cache of words: how long a text takes would tell whether somebody sent its words.

    Costs a twentieth of the time. Models without such a cache have no method to size it.
    """
    resize = getattr(backend.model, "_resize_cache", None)
    if resize is not None:
        resize(0)


def _flat_decoders(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """Give the steps that turn tokens into text, as `tokenizer.json` describes them."""
    if backend.decoder is None:
        return []
    description = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = description.get("decoders", [description])
    return steps


def _byte_alphabet() -> dict[str, int]:
    """Give the characters in which byte-level BPE writes bytes (GPT-2, `bytes_to_unicode`).

    Printable bytes stand for themselves, the others for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet |= {chr(0x100 + i): byte for i, byte in enumerate(others)}
    return alphabet


_BYTE_ALPHABET: Final = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """Give a token's bytes; one that is not written in the byte alphabet stands for itself."""
    try:
        return bytes([_BYTE_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()
