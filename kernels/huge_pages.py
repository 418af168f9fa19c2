"""Large stretches of host memory in huge pages, where the system has them.

What is read from one end to the other, or in pages that lie anywhere, waits for the addresses of
4 KiB pages. Knows nothing of what is kept there.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

HUGE_PAGE_BYTES = 2 << 20


def untouched(num_bytes: int) -> torch.Tensor:
    """`[num_bytes]` uint8, zeros; committed by first use, from a huge page's first byte on.

    Less than a huge page is ordinary memory.
    """
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)
    # Private: huge pages of shared memory are another setting of the system, and mostly off.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    area = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=flags)
    with contextlib.suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[start : start + num_bytes]
