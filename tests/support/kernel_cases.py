"""Paged batches full of poison, float64 oracles, and error bounds for the kernels' tests.

The oracles see the dense keys and values that a batch was made from, never the pool: a kernel that
reads a wrong slot can't find the same mistake here.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from kv_pages import as_stored, fill_page, poisoned_pool

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
LENGTHS = (1, 15, 16, 17, 255, 256, 257, 513)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected||, infinite where anything is NaN."""
    difference = (out.double() - expected.double()).norm() / expected.double().norm()
    return float("inf") if difference.isnan() else difference.item()


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the bound of the dtype that was computed in."""
    assert out.shape == expected.shape
    error = relative_error(out, expected)
    assert error <= BOUNDS[dtype], f"relative error {error:.2e}"


@dataclasses.dataclass
class Heads:
    """What attention looks like in one model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclasses.dataclass
class Sequence:
    """One sequence, dense: `[N, heads, D]` each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def length(self) -> int:
        return self.key.shape[0]


def random_sequence(
    heads: Heads, length: int, dtype: torch.dtype, page_dtype: torch.dtype | None = None
) -> Sequence:
    """Keys and values that pages of `page_dtype` (`dtype`, if not given) hold as they are."""
    kept = page_dtype or dtype
    return Sequence(
        torch.randn(length, heads.num_heads, heads.head_dim).to(dtype),
        as_stored(torch.randn(length, heads.num_kv_heads, heads.head_dim), kept),
        as_stored(torch.randn(length, heads.num_kv_heads, heads.head_dim), kept),
    )


@dataclasses.dataclass
class Chunk:
    """Queries `[begin, end)` of a sequence, whose keys up to `end` are in the pool."""

    sequence: Sequence
    begin: int
    end: int


class PagedBatch:
    """Chunks in a page-major pool: shuffled pages, NaN in every slot that no sequence owns."""

    def __init__(
        self,
        heads: Heads,
        chunks: list[Chunk],
        dtype: torch.dtype,
        page_dtype: torch.dtype | None = None,
    ) -> None:
        size = heads.page_size
        counts = [-(-chunk.end // size) for chunk in chunks]
        num_pages = sum(counts) + 3
        self.pool, self.pages = poisoned_pool(
            num_pages, heads.num_kv_heads, size, heads.head_dim, page_dtype or dtype
        )
        free = iter(torch.randperm(num_pages).tolist())
        poison = next(free)
        self.page_tables = torch.full((len(chunks), max(counts) + 2), poison, dtype=torch.int32)
        for b, (chunk, count) in enumerate(zip(chunks, counts, strict=True)):
            pages = list(itertools.islice(free, count))
            self.page_tables[b, :count] = torch.tensor(pages, dtype=torch.int32)
            for position in range(0, chunk.end, size):
                end = min(position + size, chunk.end)
                page = pages[position // size]
                own = slice(position, end)
                fill_page(self.pages, page, chunk.sequence.key[own], chunk.sequence.value[own])
        self.heads = heads
        self.query = torch.cat([c.sequence.query[c.begin : c.end] for c in chunks])
        self.seq_lens = torch.tensor([c.end for c in chunks], dtype=torch.int32)
        starts = itertools.accumulate((c.end - c.begin for c in chunks), initial=0)
        self.query_starts = torch.tensor(list(starts), dtype=torch.int32)

    def attend(self, ops) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """`[T, HQ, D]` by `ops`; nothing in the pool may change."""
        heads = self.heads
        before = self.pool.clone()
        out = ops.paged_attention(
            self.query,
            self.pages,
            self.page_tables,
            self.seq_lens,
            self.query_starts,
            scale=heads.scale,
            window=heads.window,
            soft_cap=heads.soft_cap,
            sinks=heads.sinks,
        )
        assert torch.equal(before, self.pool)
        return out


def attention_oracle(heads: Heads, chunk: Chunk) -> torch.Tensor:
    """One chunk in float64, query by query: `[end - begin, HQ, D]`."""
    group = heads.num_heads // heads.num_kv_heads
    rows = []
    for position in range(chunk.begin, chunk.end):
        first = 0 if heads.window is None else max(0, position - heads.window + 1)
        query = chunk.sequence.query[position].double()
        key = chunk.sequence.key[first : position + 1].double().repeat_interleave(group, dim=1)
        value = chunk.sequence.value[first : position + 1].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,nhd->hn", query, key) * heads.scale
        if heads.soft_cap is not None:
            scores = heads.soft_cap * (scores / heads.soft_cap).tanh()
        if heads.sinks is not None:
            scores = torch.cat((scores, heads.sinks.double()[:, None]), dim=1)
        weights = scores.softmax(dim=1)[:, : value.shape[0]]
        rows.append(torch.einsum("hn,nhd->hd", weights, value))
    return torch.stack(rows)
