"""Pages for the levels' tests: small, different, and known again by their number."""

from __future__ import annotations

import hashlib
import random

from kvpaging.base.ids import PageKey
from kvpaging.levels.level import StoredPage

ROOT = hashlib.sha256(b"root").digest()


def key_of(number: int) -> PageKey:
    return PageKey(hashlib.sha256(b"page %d" % number).digest())


def page_of(number: int, payload_bytes: int = 600) -> StoredPage:
    """Page `number`: the same whenever it is made, half of it like a bfloat16's exponents."""
    rng = random.Random(number)
    payload = bytearray(rng.randbytes(payload_bytes))
    payload[1::2] = bytes(rng.choice(b"\x3d\x3e\xbd\xbe") for _ in payload[1::2])
    parent = key_of(number - 1) if number else PageKey(ROOT)
    return StoredPage(key_of(number), parent, b"%16d" % number, bytes(payload))
