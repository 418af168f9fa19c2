"""Copies whole pages from one pool to another, or within one. Knows a page as a run of entries.

A pool in pinned memory of the host is read and written from the card as it is, over the bus.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.jit.launch import Launch, Schedule

_BLOCK = 4096
"""Entries of one program."""


@triton.jit
def copy_pages_kernel(
    from_pool,
    to_pool,
    sources,
    targets,
    from_stride,
    to_stride,
    page_entries,
    BLOCK: tl.constexpr,
):
    """Program (pair, stretch of a page)."""
    entry = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < page_entries
    source = tl.load(sources + tl.program_id(0)) * from_stride
    target = tl.load(targets + tl.program_id(0)) * to_stride
    tl.store(to_pool + target + entry, tl.load(from_pool + source + entry, mask=mask), mask=mask)


def copy_pages_launch(
    from_pool: torch.Tensor, sources: torch.Tensor, to_pool: torch.Tensor, targets: torch.Tensor
) -> Launch:
    """`to_pool[targets[i]] = from_pool[sources[i]]`, in place; int64 `[N]`."""
    page_entries = to_pool.shape[1:].numel()
    return Launch(
        copy_pages_kernel,
        (sources.shape[0], triton.cdiv(page_entries, _BLOCK)),
        {
            "from_pool": from_pool,
            "to_pool": to_pool,
            "sources": sources,
            "targets": targets,
            "from_stride": from_pool.stride(0),
            "to_stride": to_pool.stride(0),
            "page_entries": page_entries,
            "BLOCK": _BLOCK,
        },
        Schedule(num_warps=8, num_stages=1),
    )
