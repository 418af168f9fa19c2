"""A page as a value that describes and checks itself: what lies on disk and goes to a server.

    header     magic, version, codec, item size, three lengths, root, key, parent   116 bytes
    check      xxh3-64 of the header: lengths can be followed before the rest is read  8 bytes
    tokens     little-endian uint32
    body       the payload, compressed
    digest     xxh3-128 of all before it                                              16 bytes

Compression: the bytes of each item are sorted into planes (all first bytes, all second bytes, ...)
and each plane is compressed alone by zstd, because a bfloat16's exponents repeat and its mantissas
do not. A plane that gains nothing is stored as it is. `docs/levels.md` has the measurements.

The digest finds accidents, not forgery: `remote` puts a keyed MAC around the value.
Knows nothing of files and connections.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, cast

import numpy as np
import xxhash
import zstandard

from kvpaging.base.ids import PageKey
from kvpaging.levels.level import StoredPage

MAGIC: Final = b"KVPG"
VERSION: Final = 1
RAW: Final = 0
PLANES_ZSTD: Final = 1
_WORD_BYTES: Final = (1, 2, 4, 8)

_HEADER: Final = struct.Struct("<4sBBBxIII32s32s32s")
_CHECK_BYTES: Final = 8
_DIGEST_BYTES: Final = 16
HEADER_BYTES: Final = _HEADER.size + _CHECK_BYTES
"""The header with its check."""
OVERHEAD_BYTES: Final = HEADER_BYTES + _DIGEST_BYTES
"""What a value costs beside its tokens and body."""
KEY_BYTES: Final = 32

_SAMPLE_BYTES: Final = 2048
_WORTHWHILE: Final = 0.95
"""Planes are compressed if a sample of them shrinks below this."""


class BadValue(Exception):
    """These bytes are not the page that was asked for; the message says why."""


class OtherRoot(BadValue):
    """The page is whole, and was made under another numerics identity."""


class Header(NamedTuple):
    """What the first `HEADER_BYTES` of a value say."""

    codec: int
    item_bytes: int
    payload_bytes: int
    body_bytes: int
    token_bytes: int
    root: bytes
    key: PageKey
    parent: PageKey

    @property
    def value_bytes(self) -> int:
        """Length of the whole value."""
        return OVERHEAD_BYTES + self.token_bytes + self.body_bytes


def read_header(value: bytes | memoryview) -> Header:
    """The header at the beginning of `value`. Raises BadValue."""
    if len(value) < HEADER_BYTES:
        raise BadValue("cut off within the header")
    packed = value[: _HEADER.size]
    if xxhash.xxh3_64_digest(packed) != value[_HEADER.size : HEADER_BYTES]:
        raise BadValue("the header's check fails")
    magic, version, codec, item, payload, body, tokens, root, key, parent = _HEADER.unpack(packed)
    if magic != MAGIC or version != VERSION:
        raise BadValue(f"format {magic!r} {version}, this is {MAGIC!r} {VERSION}")
    return Header(codec, item, payload, body, tokens, root, PageKey(key), PageKey(parent))


class PageCodec:
    """Pages of one numerics identity to values and back. Safe to use from several threads.

    `item_bytes` is the size of the payload's items (2 for bfloat16), which the planes follow.
    """

    def __init__(self, root: bytes, item_bytes: int, *, compress: bool = True) -> None:
        self.root = root
        self._item_bytes = item_bytes if item_bytes in _WORD_BYTES else 1
        self.compresses = compress
        self._zstd = _ZstdOfThread()

    def encode(self, page: StoredPage) -> bytes:
        """The value of a page."""
        return b"".join(self.encode_parts(page))

    def encode_parts(self, page: StoredPage) -> list[bytes | memoryview]:
        """The value of a page in pieces; see `encode_many`."""
        return self.encode_many([page])[0]

    def encode_many(self, pages: Sequence[StoredPage]) -> list[list[bytes | memoryview]]:
        """The values of pages in pieces, for those who can write pieces: saves copying them.

        Some of them may be views of the pages' payloads. Many at once are compressed without a
        word to the interpreter between them, so that threads do not wait for each other.
        """
        payloads = [memoryview(page.payload).cast("B") for page in pages]
        bodies: list[list[memoryview]] = [[payload] for payload in payloads]
        shrinking = [i for i, payload in enumerate(payloads) if self._can_shrink(payload)]
        if shrinking:
            shrunk = self._shrink([payloads[i] for i in shrinking])
            for i, body in zip(shrinking, shrunk, strict=True):
                bodies[i] = body
        codecs = dict.fromkeys(shrinking, PLANES_ZSTD)
        return [
            self._value(page, len(payload), body, codecs.get(i, RAW))
            for i, (page, payload, body) in enumerate(zip(pages, payloads, bodies, strict=True))
        ]

    def _can_shrink(self, payload: memoryview) -> bool:
        return self.compresses and len(payload) > 0 and len(payload) % self._item_bytes == 0

    def _value(
        self, page: StoredPage, payload_bytes: int, body: list[memoryview], codec: int
    ) -> list[bytes | memoryview]:
        item = self._item_bytes if codec == PLANES_ZSTD else 1
        body_bytes = sum(map(len, body))
        header = _HEADER.pack(
            MAGIC, VERSION, codec, item, payload_bytes, body_bytes, len(page.tokens),
            self.root, page.key, page.parent,
        )  # fmt: skip
        check = xxhash.xxh3_64_digest(header)
        parts: list[bytes | memoryview] = [header, check, page.tokens, *body]
        digest = xxhash.xxh3_128()
        for part in parts:
            digest.update(part)
        return [*parts, digest.digest()]

    def decode(self, value: bytes | memoryview, key: PageKey) -> StoredPage:
        """The page `key` that `value` holds. Raises BadValue, whatever the bytes are.

        An uncompressed payload is a view of `value`.
        """
        [page] = self.decode_many([(value, key)])
        if isinstance(page, BadValue):
            raise page
        return page

    def decode_many(
        self, values: Sequence[tuple[bytes | memoryview, PageKey]]
    ) -> list[StoredPage | BadValue]:
        """The pages of these keys, or why one is none; see `decode` and `encode_many`.

        Payloads that were compressed lie in one piece of memory, which each of them keeps.
        """
        bodies = [self._body(memoryview(value), key) for value, key in values]
        packed = [body for body in bodies if isinstance(body, _Body) and body.is_packed]
        try:
            grown: Sequence[memoryview | BadValue] = self._grow(packed)
        except BadValue:  # one of them at least: find out which
            grown = [self._grow_one(body) for body in packed]
        payloads = iter(grown)
        return [
            body
            if isinstance(body, BadValue)
            else body.page(next(payloads) if body.is_packed else body.data)
            for body in bodies
        ]

    def _body(self, value: memoryview, key: PageKey) -> _Body | BadValue:
        try:
            header = self.check(value, key)
            body_at = HEADER_BYTES + header.token_bytes
            data = value[body_at : body_at + header.body_bytes]
            return _Body.of(header, bytes(value[HEADER_BYTES:body_at]), data)
        except BadValue as error:
            return error

    def check(self, value: memoryview, key: PageKey) -> Header:
        """That `value` is whole, unchanged, and the page `key` of this root. Raises BadValue."""
        header = read_header(value)
        if header.value_bytes != len(value):
            raise BadValue(f"{len(value)} bytes of {header.value_bytes}")
        if xxhash.xxh3_128_digest(value[:-_DIGEST_BYTES]) != value[-_DIGEST_BYTES:]:
            raise BadValue("the digest fails")
        if header.key != key:
            raise BadValue("another page")
        if header.root != self.root:
            raise OtherRoot("a page of another numerics identity")
        return header

    def _shrink(self, payloads: list[memoryview]) -> list[list[memoryview]]:
        """Of each: sizes of the planes as uint32, then the planes. One of its full size is raw."""
        own = [np.frombuffer(payload, _word(self._item_bytes)) for payload in payloads]
        ends = list(itertools.accumulate(map(len, own)))
        bounds = list(zip([0, *ends], ends, strict=False))
        words = np.concatenate(own)
        planes: list[list[memoryview]] = []
        for i in range(self._item_bytes):
            if i:
                words >>= 8
            plane = words.astype(np.uint8).data
            planes.append(self._zstd.shrink([plane[first:end] for first, end in bounds]))
        return [
            [memoryview(np.array([len(plane) for plane in body], "<u4").tobytes()), *body]
            for body in zip(*planes, strict=True)
        ]

    def _grow_one(self, body: _Body) -> memoryview | BadValue:
        try:
            return self._grow([body])[0]
        except BadValue as error:
            return error

    def _grow(self, bodies: Sequence[_Body]) -> list[memoryview]:
        """The payloads of packed bodies. Raises BadValue if any of them is none."""
        payloads: dict[int, list[memoryview]] = {}
        for item_bytes in {body.header.item_bytes for body in bodies}:
            alike = [body for body in bodies if body.header.item_bytes == item_bytes]
            payloads[item_bytes] = self._grow_alike(item_bytes, alike)[::-1]
        return [payloads[body.header.item_bytes].pop() for body in bodies]

    def _grow_alike(self, item_bytes: int, bodies: Sequence[_Body]) -> list[memoryview]:
        sizes = [body.header.payload_bytes // item_bytes for body in bodies]
        planes = list(zip(*(body.planes() for body in bodies), strict=True))
        words = np.concatenate(self._zstd.grow(planes.pop(), sizes), dtype=_word(item_bytes))
        for plane in reversed(planes):
            words <<= 8
            words |= np.concatenate(self._zstd.grow(plane, sizes))
        data = words.view(np.uint8).data
        ends = list(itertools.accumulate(body.header.payload_bytes for body in bodies))
        return [data[first:end] for first, end in zip([0, *ends], ends, strict=False)]


class _Body(NamedTuple):
    """A value that is whole, and not yet expanded."""

    header: Header
    tokens: bytes
    data: memoryview

    @classmethod
    def of(cls, header: Header, tokens: bytes, data: memoryview) -> _Body:
        """Raises BadValue for a codec that is not known, or lengths that can't be."""
        is_raw = header.codec == RAW and header.body_bytes == header.payload_bytes
        if not is_raw and (header.codec != PLANES_ZSTD or header.item_bytes not in _WORD_BYTES):
            raise BadValue(f"codec {header.codec} is not known here")
        body = cls(header, tokens, data)
        if not is_raw and (
            header.payload_bytes % header.item_bytes or len(data) < 4 * header.item_bytes
        ):
            raise BadValue("the planes do not fit the payload")
        return body

    @property
    def is_packed(self) -> bool:
        """The payload is in planes."""
        return self.header.codec == PLANES_ZSTD

    def planes(self) -> list[memoryview]:
        """The planes as they are stored, the lowest bytes first."""
        at = 4 * self.header.item_bytes
        sizes = struct.unpack(f"<{self.header.item_bytes}I", self.data[:at])
        ends = list(itertools.accumulate(sizes, initial=at))
        return [self.data[first:end] for first, end in itertools.pairwise(ends)]

    def page(self, payload: memoryview | BadValue) -> StoredPage | BadValue:
        """The page, where its payload could be had."""
        if isinstance(payload, BadValue):
            return payload
        return StoredPage(self.header.key, self.header.parent, self.tokens, payload)


def _word(item_bytes: int) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype(f"<u{item_bytes}")


class _ZstdOfThread(threading.local):
    """zstd's contexts; each thread has its own.

    Hardly any matching, for there is nothing to match: nearly all of the gain is the entropy of
    the exponents, and a small hash table finds the zeros.
    """

    def __init__(self) -> None:
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            window_log=15,
            hash_log=6,
            chain_log=6,
            search_log=1,
            min_match=7,
            target_length=0,  # more than 0 would leave the literals uncompressed
            write_content_size=False,
        )
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor()

    def shrink(self, planes: list[memoryview]) -> list[memoryview]:
        """The planes compressed, each itself where that gains nothing."""
        share = max(1, _SAMPLE_BYTES // len(planes))
        sample = b"".join(plane[:share] for plane in planes)
        if len(self._compressor.compress(sample)) > _WORTHWHILE * len(sample):
            return planes
        given: list[bytes | bytearray | memoryview] = [*planes]
        found = self._compressor.multi_compress_to_buffer(given)
        smaller = [memoryview(cast(bytes, found[i])) for i in range(len(planes))]
        return [
            small if len(small) < len(plane) else plane
            for small, plane in zip(smaller, planes, strict=True)
        ]

    def grow(
        self, planes: Sequence[memoryview], sizes: Sequence[int]
    ) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
        """Planes of so many bytes, and no more whatever they say. Raises BadValue."""
        small = [i for i, plane in enumerate(planes) if len(plane) != sizes[i]]
        grown: list[Any] = [*planes]
        if small:
            wanted = np.array([sizes[i] for i in small], np.uint64)
            try:
                found = self._decompressor.multi_decompress_to_buffer(
                    [planes[i] for i in small], decompressed_sizes=wanted.tobytes()
                )
            except (zstandard.ZstdError, ValueError) as error:
                raise BadValue(f"zstd: {error}") from None
            for k, i in enumerate(small):
                grown[i] = found[k]
        return [np.frombuffer(plane, np.uint8) for plane in grown]
