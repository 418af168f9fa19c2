"""Where keys and values lie: one tensor for all pages of all layers.

`[num_pages + 1, page_bytes]`: a page is one contiguous span of bytes, as `KVSpec` lays it out, so
that moving it between levels is one copy. Page 0 is the scratch page. Knows nothing of who owns a
page.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from kernels.huge_pages import untouched
from kernels.ops import KVPages
from kvpaging.base.kv_spec import KVSpec

TORCH_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
}


class KVPool:
    """The pool's tensor and views of it for each layer.

    Owns the memory. On a CPU pages that were never written cost none.
    """

    def __init__(self, spec: KVSpec, num_pages: int, device: torch.device) -> None:
        """Make room for `num_pages` pages and the scratch page. Contents are arbitrary."""
        self.spec = spec
        self.num_pages = num_pages
        shape = (num_pages + 1, spec.page_bytes)
        if device.type == "cpu":
            self.pages = untouched(math.prod(shape)).view(shape)
        else:
            self.pages = torch.empty(shape, dtype=torch.uint8, device=device)
        self._layers = [self._views(layer) for layer in range(spec.num_layers)]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole pool, the scratch page included."""
        return self.pages.numel()

    def layer(self, index: int) -> KVPages:
        """A layer's pages, scratch page included: writing to them writes to the pool."""
        return self._layers[index]

    def _views(self, layer: int) -> KVPages:
        spec = self.spec
        at = layer * (spec.page_bytes // spec.num_layers)
        heads = (spec.num_kv_heads, spec.page_size)
        entries, dtype = (*heads, spec.head_dim), TORCH_DTYPES[spec.dtype]
        keys = self._view(at, entries, dtype)
        at += spec.entry_bytes
        values = self._view(at, entries, dtype)
        if not spec.is_quantised:
            return KVPages(keys, values)
        at += spec.entry_bytes
        key_scales = self._view(at, heads, torch.float32)
        at += spec.scale_bytes
        return KVPages(keys, values, key_scales, self._view(at, heads, torch.float32))

    def _view(self, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """`[num_pages + 1, *shape]` of `dtype`, from byte `begin` of each page."""
        num_bytes = math.prod(shape) * dtype.itemsize
        part = self.pages[:, begin : begin + num_bytes]
        return part.view(dtype).view(-1, *shape)
