"""The shape of a KV page, as numbers: what the allocator counts and the pool is made from.

Knows no tensor and no device.
"""

from __future__ import annotations

from typing import Final

import msgspec

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
"""What models compute in."""
QUANTISED_BYTES: Final = {"int8": 1, "fp8_e4m3": 1}
"""What pages may also hold, with a scale for each token and head."""
SCALE_BYTES: Final = 4


class KVSpec(msgspec.Struct, frozen=True):
    """One group of layers that share a page table.

    A page is one contiguous span of bytes: for each layer its keys and its values, each
    `[num_kv_heads, page_size, head_dim]` of `dtype`, and where those are quantised the scales of
    the keys and of the values, each `[num_kv_heads, page_size]` float32. A pool is `num_pages` such
    spans. Nothing is padded, and all parts begin at multiples of 4 bytes.
    A second group (layers with a window, which may free pages that the others keep) would be a
    second `KVSpec`; one is enough so far.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    """Of `DTYPE_BYTES` or `QUANTISED_BYTES`."""

    @property
    def is_quantised(self) -> bool:
        """Pages have scales."""
        return self.dtype in QUANTISED_BYTES

    @property
    def item_bytes(self) -> int:
        """Bytes of one entry of a key or value."""
        return (DTYPE_BYTES | QUANTISED_BYTES)[self.dtype]

    @property
    def entry_bytes(self) -> int:
        """Bytes of a layer's keys in a page, without their scales; its values take as many."""
        return self.num_kv_heads * self.page_size * self.head_dim * self.item_bytes

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a layer's keys in a page; those of its values take as many."""
        return self.num_kv_heads * self.page_size * SCALE_BYTES if self.is_quantised else 0

    @property
    def page_bytes(self) -> int:
        """Bytes that one page occupies in any level."""
        return self.num_layers * 2 * (self.entry_bytes + self.scale_bytes)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)
