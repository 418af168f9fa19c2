"""Copies whole pages within a pool. Knows a page as a run of bytes."""
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
def copy_pages_kernel(pool, sources, targets, page_stride, page_entries, BLOCK: tl.constexpr):
    """Program (pair, stretch of a page)."""
    entry = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < page_entries
    source = tl.load(sources + tl.program_id(0)) * page_stride
    target = tl.load(targets + tl.program_id(0)) * page_stride
    tl.store(pool + target + entry, tl.load(pool + source + entry, mask=mask), mask=mask)


def copy_pages_launch(pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> Launch:
    """`pool[targets[i]] = pool[sources[i]]`, in place; int64 `[N]`."""
    page_entries = pool[0].numel()
    return Launch(
        copy_pages_kernel,
        (sources.shape[0], triton.cdiv(page_entries, _BLOCK)),
        {
            "pool": pool,
            "sources": sources,
            "targets": targets,
            "page_stride": pool.stride(0),
            "page_entries": page_entries,
            "BLOCK": _BLOCK,
        },
        Schedule(num_warps=8, num_stages=1),
    )
