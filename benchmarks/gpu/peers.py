"""The attention of other packages on the problems of ours, where such a package is installed.

FlashInfer reads the same pages; FlashAttention and torch have dense keys and values. Knows how each
is called, and nothing of time.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from kernels.ops import KVPages

WORKSPACE_BYTES = 256 << 20


class Problem(NamedTuple):
    """Sequences of equal length whose last queries are computed, causally."""

    query: torch.Tensor
    """[B * queries, HQ, D]"""
    pages: KVPages
    page_tables: torch.Tensor
    """[B, pages] int32, on the device."""
    seq_len: int

    @property
    def num_queries(self) -> int:
        """Of each sequence."""
        return self.query.shape[0] // self.page_tables.shape[0]


Peer = tuple[str, Callable[[], Callable[[], object]]]
"""Its name and version, and what prepares a call of it."""


def peers(problem: Problem) -> Iterator[Peer]:
    """All that can take the problem, torch last."""
    if version := version_of("flashinfer"):
        yield f"flashinfer {version}, pages", lambda: flashinfer_call(problem)
    if version := version_of("flash_attn"):
        yield f"flash_attn {version}, dense", lambda: flash_attn_call(problem)
    # torch's causal mask is aligned at the first key: right for whole prompts only.
    if problem.num_queries in (1, problem.seq_len):
        yield f"torch {torch.__version__}, dense", lambda: torch_call(problem)


def version_of(package: str) -> str | None:
    """Of an installed package, `None` without it."""
    if importlib.util.find_spec(package) is None:
        return None
    return str(getattr(importlib.import_module(package), "__version__", "of unknown version"))


def flashinfer_call(problem: Problem) -> Callable[[], object]:
    """Its paged wrappers with heads before tokens in a page, as our pages are."""
    flashinfer = importlib.import_module("flashinfer")
    query, tables = problem.query, problem.page_tables
    _, kv_heads, page_size, head_dim = problem.pages.keys.shape
    count, pages_each = tables.shape
    device, dtype = query.device, query.dtype
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    numbers = torch.arange(count + 1, dtype=torch.int32, device=device)
    last = (problem.seq_len - 1) % page_size + 1
    last_page_len = torch.full((count,), last, dtype=torch.int32, device=device)
    rest = (query.shape[1], kv_heads, head_dim, page_size)
    dtypes = {"q_data_type": dtype, "kv_data_type": dtype}
    where = (numbers * pages_each, tables.flatten(), last_page_len)
    if problem.num_queries == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=True
        )
        wrapper.plan(*where, *rest, **dtypes)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(numbers * problem.num_queries, *where, *rest, causal=True, **dtypes)
    pages = (problem.pages.keys, problem.pages.values)
    return lambda: wrapper.run(query, pages)


def flash_attn_call(problem: Problem) -> Callable[[], object]:
    """Its dense function: the causal mask is aligned at the last key."""
    attend = importlib.import_module("flash_attn").flash_attn_func
    query, key, value = (tensor.transpose(1, 2).contiguous() for tensor in dense(problem))
    return lambda: attend(query, key, value, causal=True)


def torch_call(problem: Problem) -> Callable[[], object]:
    """Whatever torch takes for these shapes."""
    query, key, value = dense(problem)
    causal = problem.num_queries > 1
    return lambda: F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=True
    )


def dense(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values `[B, heads, tokens, D]`; keys and values are random."""
    _, kv_heads, _, head_dim = problem.pages.keys.shape
    count, query = problem.page_tables.shape[0], problem.query
    shape = (count, kv_heads, problem.seq_len, head_dim)
    key, value = (torch.randn(shape, device=query.device, dtype=query.dtype) for _ in range(2))
    rows = query.view(count, problem.num_queries, -1, head_dim).transpose(1, 2).contiguous()
    return rows, key, value
