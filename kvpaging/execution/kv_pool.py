"""Where keys and values lie: one tensor for all pages of all layers.

`[num_pages + 1, num_layers, 2, num_kv_heads, page_size, head_dim]`: a page is one contiguous span,
so that moving it between levels is one copy. Page 0 is the scratch page. Knows nothing of who owns
a page.
"""

from __future__ import annotations

import math
import mmap

import torch

from kvpaging.base.ids import PageId
from kvpaging.base.kv_spec import KVSpec


class KVPool:
    """The pool's tensor and a view of it for each layer.

    Owns the memory. On a CPU pages that were never written cost none.
    """

    def __init__(self, spec: KVSpec, num_pages: int, device: torch.device) -> None:
        """Make room for `num_pages` pages and the scratch page. Contents are arbitrary."""
        self.spec = spec
        self.num_pages = num_pages
        dtype = getattr(torch, spec.dtype)
        shape = (num_pages + 1, *spec.page_shape)
        if device.type == "cpu":
            self.pages = _untouched(shape, dtype)
        else:
            self.pages = torch.empty(shape, dtype=dtype, device=device)
        self._layers = [
            (self.pages[:, layer, 0], self.pages[:, layer, 1]) for layer in range(spec.num_layers)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole pool, the scratch page included."""
        return self.pages.numel() * self.pages.element_size()

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value pages of a layer: `[num_pages + 1, num_kv_heads, page_size, head_dim]`.

        Views with the pool's page stride: writing to them writes to the pool.
        """
        return self._layers[index]

    def read_page(self, page_id: PageId) -> bytes:
        """A copy of the page's span."""
        return self._span(page_id).cpu().numpy().tobytes()

    def write_page(self, page_id: PageId, payload: bytes | memoryview) -> None:
        """Make `payload`, of `spec.page_bytes` bytes, the page's span; it is there on return."""
        with torch.inference_mode():
            # A bytearray: torch warns of memory that can't be written to.
            self._span(page_id).copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
            if self.pages.is_cuda:
                torch.cuda.current_stream().synchronize()

    def _span(self, page_id: PageId) -> torch.Tensor:
        """`[page_bytes]` uint8, a view."""
        return self.pages[page_id].view(-1).view(torch.uint8)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Anonymous memory in huge pages where the system has them; it is committed by first use."""
    count = math.prod(shape)
    num_bytes = count * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
