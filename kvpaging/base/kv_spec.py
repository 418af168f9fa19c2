"""The shape of a KV page, as numbers: what the allocator counts and the pool is made from.

Knows no tensor and no device.
"""

from __future__ import annotations

import msgspec

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class KVSpec(msgspec.Struct, frozen=True):
    """One group of layers that share a page table.

    A page is one contiguous span `[num_layers, 2, num_kv_heads, page_size, head_dim]` of `dtype`
    (2: keys, then values), and a pool is `[num_pages, *page]`.
    A second group (layers with a window, which may free pages that the others keep) would be a
    second `KVSpec`; one is enough so far.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """`(num_layers, 2, num_kv_heads, page_size, head_dim)`."""
        return (self.num_layers, 2, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes that one page occupies in any level."""
        return (
            self.num_layers * 2 * self.num_kv_heads * self.page_size * self.head_dim
        ) * DTYPE_BYTES[self.dtype]

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)
