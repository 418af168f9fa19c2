"""Pages for the levels' tests: small, different, and known again by their number."""

from __future__ import annotations

import hashlib
import random

from kvpaging.base.ids import PageKey
from kvpaging.levels.level import StoredPage

ROOT = PageKey(hashlib.sha256(b"root").digest())


def key_of(number: int) -> PageKey:
    return PageKey(hashlib.sha256(b"page %d" % number).digest())


def page_of(number: int, payload_bytes: int = 600, parent: PageKey = ROOT) -> StoredPage:
    """Page `number`: the same whenever it is made, half of it like a bfloat16's exponents.

    The first of a chain, unless another page's key is given as `parent`.
    """
    rng = random.Random(number)
    payload = bytearray(rng.randbytes(payload_bytes))
    payload[1::2] = bytes(rng.choice(b"\x3d\x3e\xbd\xbe") for _ in payload[1::2])
    return StoredPage(key_of(number), parent, b"%16d" % number, bytes(payload))
