"""Paged batches full of poison, float64 oracles, error bounds, and checks for every path's tests.

The oracles see the dense keys and values that a batch was made from, never the pool: a kernel that
reads a wrong slot can't find the same mistake here. Everything lies on the device of what it is
made from. Knows no path by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable

import torch
from kv_pages import as_stored, fill_page, poisoned_pool

from kernels.ops import Linear, Ops
from kernels.reference import TorchOps

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
LENGTHS = (1, 15, 16, 17, 255, 256, 257, 513)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected||, infinite where anything isn't finite."""
    wide, wanted = out.double().cpu(), expected.double().cpu()
    if not wide.isfinite().all():
        return math.inf
    return float((wide - wanted).norm() / wanted.norm())


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
    heads: Heads,
    length: int,
    dtype: torch.dtype,
    page_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Sequence:
    """Keys and values that pages of `page_dtype` (`dtype`, if not given) hold as they are."""
    kept = page_dtype or dtype
    return Sequence(
        torch.randn(length, heads.num_heads, heads.head_dim).to(dtype).to(device),
        as_stored(torch.randn(length, heads.num_kv_heads, heads.head_dim), kept).to(device),
        as_stored(torch.randn(length, heads.num_kv_heads, heads.head_dim), kept).to(device),
    )


@dataclasses.dataclass
class Chunk:
    """Queries `[begin, end)` of a sequence, whose keys up to `end` are in the pool."""

    sequence: Sequence
    begin: int
    end: int


class PagedBatch:
    """Chunks in a page-major pool: shuffled pages, NaN in every slot that no sequence owns.

    Full pages that hold the same at the same place lie in the pool once: beginnings are shared.
    """

    def __init__(
        self,
        heads: Heads,
        chunks: list[Chunk],
        dtype: torch.dtype,
        page_dtype: torch.dtype | None = None,
        *,
        width: int = 0,
    ) -> None:
        """`width`: least width of the page tables."""
        size, device = heads.page_size, chunks[0].sequence.key.device
        counts = [-(-chunk.end // size) for chunk in chunks]
        num_pages = sum(counts) + 3
        self.pool, self.pages = poisoned_pool(
            num_pages, heads.num_kv_heads, size, heads.head_dim, page_dtype or dtype, str(device)
        )
        free = iter(torch.randperm(num_pages).tolist())
        poison = next(free)
        tables = torch.full((len(chunks), max(max(counts) + 2, width)), poison, dtype=torch.int32)
        full: dict[tuple[int, bytes], int] = {}
        for b, chunk in enumerate(chunks):
            for index, position in enumerate(range(0, chunk.end, size)):
                own = slice(position, min(position + size, chunk.end))
                keys, values = chunk.sequence.key[own], chunk.sequence.value[own]
                page = next(free)
                if len(keys) == size:
                    both = torch.stack((keys, values)).cpu().view(torch.uint8)
                    page = full.setdefault((index, both.numpy().tobytes()), page)
                tables[b, index] = page
                fill_page(self.pages, page, keys, values)
        self.heads = heads
        self.num_queries = [chunk.end - chunk.begin for chunk in chunks]
        starts = list(itertools.accumulate(self.num_queries, initial=0))
        self.query = torch.cat([c.sequence.query[c.begin : c.end] for c in chunks])
        self.page_tables = tables.to(device)
        self.seq_lens = torch.tensor([c.end for c in chunks], dtype=torch.int32, device=device)
        self.query_starts = torch.tensor(starts, dtype=torch.int32, device=device)

    def attend(self, ops: Ops) -> torch.Tensor:
        """`[T, HQ, D]` by `ops`; nothing in the pool may change."""
        before = self.pool.clone()
        out = ops.paged_attention(*self._arguments(), **self._options())
        assert torch.equal(before, self.pool), "attention wrote to the pool"
        return out

    def attend_apart(self, ops: Ops) -> list[torch.Tensor]:
        """The same, chunk by chunk."""
        return list(self.attend(ops).split(self.num_queries))

    def state(self, ops: Ops) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and the logarithms of their weights; the means are those of `attend`."""
        out, lse = ops.paged_attention_state(*self._arguments(), **self._options())
        assert torch.equal(out, self.attend(ops))
        return out, lse

    def _arguments(self) -> tuple:  # type: ignore[type-arg]
        return self.query, self.pages, self.page_tables, self.seq_lens, self.query_starts

    def _options(self) -> dict:  # type: ignore[type-arg]
        heads = self.heads
        return {
            "scale": heads.scale,
            "window": heads.window,
            "soft_cap": heads.soft_cap,
            "sinks": heads.sinks,
        }


def attention_oracle(heads: Heads, chunk: Chunk) -> torch.Tensor:
    """One chunk in float64 on the CPU: `[end - begin, HQ, D]`."""
    return state_oracle(heads, chunk)[0]


def state_oracle(heads: Heads, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of a chunk's queries, and the logarithms of their weights' sums `[Q, HQ]`."""
    group = heads.num_heads // heads.num_kv_heads
    begin, end = chunk.begin, chunk.end
    query = chunk.sequence.query[begin:end].double().cpu()
    key = chunk.sequence.key[:end].double().cpu().repeat_interleave(group, dim=1)
    value = chunk.sequence.value[:end].double().cpu().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * heads.scale
    if heads.soft_cap is not None:
        scores = heads.soft_cap * (scores / heads.soft_cap).tanh()
    apart = torch.arange(begin, end)[:, None] - torch.arange(end)
    visible = (apart >= 0) & (apart < (heads.window or end + 1))
    scores = scores.masked_fill(~visible, -math.inf)
    if heads.sinks is not None:
        sink = heads.sinks.double().cpu()[:, None, None].expand(-1, end - begin, 1)
        scores = torch.cat((scores, sink), dim=2)
    weights = scores.softmax(dim=2)[..., :end]
    return torch.einsum("hqk,khd->qhd", weights, value), scores.logsumexp(dim=2).T


def mixed_chunks(
    heads: Heads,
    dtype: torch.dtype,
    lengths: tuple[int, ...] = LENGTHS,
    page_dtype: torch.dtype | None = None,
) -> list[Chunk]:
    """Of each length: a decode step or a chunk of random size."""
    chunks = []
    for length in lengths:
        begin = random.choice([length - 1, random.randint(max(0, length - 40), length - 1)])
        chunks.append(Chunk(random_sequence(heads, length, dtype, page_dtype), begin, length))
    random.shuffle(chunks)
    return chunks


def check_attention(
    ops: Ops, heads: Heads, dtype: torch.dtype, page_dtype: torch.dtype | None = None
) -> None:
    """A mixed batch over poisoned pages, against float64."""
    chunks = mixed_chunks(heads, dtype, page_dtype=page_dtype)
    out = PagedBatch(heads, chunks, dtype, page_dtype).attend(ops)
    assert_close(out, torch.cat([attention_oracle(heads, chunk) for chunk in chunks]), dtype)


def check_attention_bits(
    one: Ops, three: Ops, heads: Heads, dtype: torch.dtype, kept: torch.dtype | None
) -> None:
    """Chunks, mates, pages and threads (`one` and `three` of them) change no bit."""
    length = 540
    heads = dataclasses.replace(heads, sinks=torch.randn(heads.num_heads))
    sequence = random_sequence(heads, length, dtype, kept)
    # Of many sizes: sums of products of 16-bit numbers of one size would be exact in any order.
    sizes = 2.0 ** torch.randint(-8, 9, (length, 1, 1))
    sequence.value = as_stored(sequence.value.float() * sizes, kept or dtype)
    whole = PagedBatch(heads, [Chunk(sequence, 0, length)], dtype, kept).attend(one)
    again = PagedBatch(heads, [Chunk(sequence, 0, length)], dtype, kept).attend(three)
    assert torch.equal(again, whole)

    # Chunks, each beside a batch mate and in new pages; page sizes too.
    begin = 0
    while begin < length:
        end = min(length, begin + random.choice([1, 5, 16, 37, 64, 200]))
        other = dataclasses.replace(heads, page_size=random.choice([1, 4, 16, 64, 128]))
        chunks = [Chunk(sequence, begin, end), *mixed_chunks(other, dtype, (3, 290), kept)]
        out = PagedBatch(other, chunks, dtype, kept).attend(random.choice([one, three]))
        assert torch.equal(out[: end - begin], whole[begin:end]), f"{begin}..{end}"
        begin = end

    # Decode steps.
    for position in (0, 15, 16, 255, 256, 257, 511, 539, *random.sample(range(length), 8)):
        chunk = Chunk(sequence, position, position + 1)
        for ops in (one, three):
            out = PagedBatch(heads, [chunk], dtype, kept).attend(ops)
            assert torch.equal(out, whole[position : position + 1]), f"position {position}"


def check_shared_beginnings(
    one: Ops, three: Ops, heads: Heads, dtype: torch.dtype, kept: torch.dtype | None
) -> None:
    """Decode steps that share the pages of their beginnings: the bits of each one alone.

    Some part in the middle of a split, and some come with more queries than one.
    """
    common = random_sequence(heads, 800, dtype, kept)
    forks = [0, 120, 256, 300, 512, 600, 777]
    # Two that part within their second split, one whose beginning is the other's, one that rests.
    shapes = [(300, 300, 1), (777, 300, 1), (512, 16, 1), (512, 20, 0)]
    for fork in random.choices(forks, k=random.randint(0, 16)):
        length = random.choice([1, 16, 17, 255, 256, 300])
        shapes.append((fork, length, random.choice([1, 1, 1, 1, min(5, length)])))
    chunks = []
    for fork, length, num_queries in shapes:
        own = random_sequence(heads, length, dtype, kept)
        parts = zip(
            (common.query[:fork], common.key[:fork], common.value[:fork]),
            (own.query, own.key, own.value),
            strict=True,
        )
        sequence = Sequence(*(torch.cat(pair) for pair in parts))
        chunks.append(Chunk(sequence, fork + length - num_queries, fork + length))
    random.shuffle(chunks)
    batch = PagedBatch(heads, chunks, dtype, kept)
    first = batch.page_tables[:, 512 // heads.page_size - 1].tolist()
    assert max(map(first.count, first)) > 1, "no two sequences share a page"
    out, lse = batch.state(random.choice([one, three]))
    apart = zip(chunks, out.split(batch.num_queries), lse.split(batch.num_queries), strict=True)
    for chunk, means, weights in apart:
        if not len(means):
            continue
        alone = PagedBatch(heads, [chunk], dtype, kept).state(one)
        assert torch.equal(means, alone[0])
        assert torch.equal(weights, alone[1])
    assert_close(out, torch.cat([attention_oracle(heads, chunk) for chunk in chunks]), dtype)


def rows_alone(
    one: Ops, three: Ops, prepare: Callable[[Ops], Linear], x: torch.Tensor
) -> torch.Tensor:
    """Each row of x by itself; the same among any others, at any place, on more threads."""
    prepared = prepare(one)
    alone = torch.cat([one.linear_float32(x[m : m + 1], prepared) for m in range(len(x))])
    for m in range(1, len(x) + 1):
        first = int(torch.randint(0, len(x) + 1 - m, ()))
        part = one.linear_float32(x[first : first + m], prepared)
        assert torch.equal(part, alone[first : first + m]), f"M={m}"
    assert torch.equal(three.linear_float32(x, prepare(three)), alone)
    return alone


def check_unseen(ops: Ops, dtype: torch.dtype, kept: torch.dtype | None) -> None:
    """Keys behind a query, or before its window, are not touched by its arithmetic.

    They are computed with it all the same, since others of its block see them. What a key leaves
    untouched begins at an even and at an odd position: kernels may take two keys at once.
    """
    # All queries at once, and few beside each other.
    chunks = [(0, 60), *((begin, begin + 5) for begin in (27, 28, 30, 38, 41))]
    for edge, window in itertools.product((30, 31), (None, 12)):
        heads = Heads(4, 2, 32, window=window)
        sequence = random_sequence(heads, 60, dtype, kept)
        parts = [(slice(edge, None), range(edge))]
        if window is not None:
            parts.append((slice(0, edge), range(edge + window - 1, 60)))
        for spoilt_keys, own_rows in parts:
            other = Sequence(sequence.query, sequence.key.clone(), sequence.value.clone())
            other.key[spoilt_keys] = torch.nan
            other.value[spoilt_keys] = torch.inf
            for begin, end in chunks:
                own = [row - begin for row in own_rows if begin <= row < end]
                clean, spoilt = (
                    PagedBatch(heads, [Chunk(each, begin, end)], dtype, kept).attend(ops)
                    for each in (sequence, other)
                )
                assert torch.equal(spoilt[own], clean[own]), f"{spoilt_keys}, {begin}, {window}"


def check_order_of_pairs(ops: Ops, dtype: torch.dtype) -> None:
    """Each key's place in the sum, where a kernel may add two keys in one step.

    All weights are 1. Small values lie at even positions, at odd ones a large one comes and goes:
    what is left of a sum is the last small value, or nothing if that was added before the large
    one went. The rounding of the result hides no such difference, as it does of random values.
    """
    heads, length = Heads(2, 2, 32), 41
    sequence = random_sequence(heads, length, dtype)
    sequence.query.zero_()
    sequence.value *= 2.0**-12
    large = 2.0**14 * (-1.0) ** torch.arange(length // 2)
    sequence.value[1::2] = large[:, None, None].to(dtype)
    steps = [
        PagedBatch(heads, [Chunk(sequence, at, at + 1)], dtype).attend(ops) for at in range(length)
    ]
    chunks = [(begin, length) for begin in range(8)]  # whichever rows a kernel takes together,
    chunks += [(begin, begin + 9) for begin in range(length - 9)]  # and if it takes few otherwise
    for begin, end in chunks:
        whole = PagedBatch(heads, [Chunk(sequence, begin, end)], dtype).attend(ops)
        assert torch.equal(whole, torch.cat(steps[begin:end])), f"{begin} to {end}"


def check_states(
    ops: Ops, heads: Heads, dtype: torch.dtype, device: str, page_dtype: torch.dtype | None = None
) -> None:
    """The weights of a mixed batch against float64."""
    chunks = [
        Chunk(random_sequence(heads, length, dtype, page_dtype, device), begin, length)
        for length, begin in ((1, 0), (257, 256), (300, 260), (40, 0))
    ]
    out, lse = PagedBatch(heads, chunks, dtype, page_dtype).state(ops)
    expected = [state_oracle(heads, chunk) for chunk in chunks]
    assert lse.dtype == torch.float32
    # Weights of values may be rounded to 16 bits before they are summed.
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    assert (lse.double().cpu() - torch.cat([each[1] for each in expected])).abs().max() < bound
    # Some paths round the weights of quantised values to bfloat16.
    rounded = torch.bfloat16 if dtype == torch.float16 and page_dtype else dtype
    assert_close(out, torch.cat([each[0] for each in expected]), rounded)


def check_merge_state(ops: Ops, dtype: torch.dtype, device: str) -> None:
    """A prefix that queries share and what follows it, merged: attention over both.

    And that a part of no weight changes no bit, whatever it holds.
    """
    heads = Heads(4, 2, 40, page_size=8, sinks=torch.randn(4).to(device))
    no_sinks = dataclasses.replace(heads, sinks=None)
    prefix, length = 270, 300
    whole = random_sequence(heads, length, dtype, device=device)
    chunk = Chunk(whole, prefix, length)
    own = Sequence(*(part[prefix:] for part in (whole.query, whole.key, whole.value)))
    after = PagedBatch(heads, [Chunk(own, 0, length - prefix)], dtype).state(ops)
    # Each query is a sequence of its own over the prefix: all of them see all of it.
    common = PagedBatch(no_sinks, [Chunk(whole, prefix - 1, prefix)], dtype)
    num_queries = length - prefix
    common.query = own.query
    common.page_tables = common.page_tables.expand(num_queries, -1).contiguous()
    common.seq_lens = common.seq_lens.expand(num_queries).contiguous()
    common.query_starts = torch.arange(num_queries + 1, dtype=torch.int32, device=device)
    before = common.state(ops)

    out, lse = ops.merge_state(*before, *after)
    expected, expected_lse = state_oracle(heads, chunk)
    assert relative_error(out, expected) <= 2 * BOUNDS[dtype]  # rounded twice
    assert (lse.double().cpu() - expected_lse).abs().max() < (1e-5 if dtype.itemsize == 4 else 5e-3)
    one = ops.merge_state(*(part[7:8].contiguous() for part in (*before, *after)))
    assert torch.equal(one[0], out[7:8])
    assert torch.equal(one[1], lse[7:8])

    nothing = torch.full_like(before[0], torch.nan), torch.full_like(lse, -torch.inf)
    for parts in ((*before, *nothing), (*nothing, *before)):
        alone = ops.merge_state(*parts)
        assert torch.equal(alone[0], before[0])
        assert torch.equal(alone[1], before[1])
    empty = ops.merge_state(*nothing, *nothing)
    assert not empty[0].any()
    assert (empty[1] == -torch.inf).all()


def check_store_kv(
    ops: Ops, dtype: torch.dtype, device: str, page_dtype: torch.dtype | None = None
) -> None:
    """Plain pages hold what was given; quantised ones what plain torch makes of it, bit by bit."""
    tokens, num_kv_heads, head_dim, size, num_pages = 21, 10, 40, 16, 4
    wide = torch.randn(2, tokens, num_kv_heads + 3, head_dim).to(dtype).to(device)
    key, value = wide[0, :, :num_kv_heads], wide[1, :, 3:]
    slots = torch.randperm(num_pages * size)[:tokens].to(device)
    slots[5] = -1
    pools = []
    for path in (ops, TorchOps(device)):
        pool, pages = poisoned_pool(
            num_pages, num_kv_heads, size, head_dim, page_dtype or dtype, device
        )
        path.store_kv(key, value, pages, slots)
        pools.append(pool)
    assert torch.equal(pools[0], pools[1])
    if page_dtype is None:
        place = int(slots[3])
        at = (place // size, slice(None), place % size)
        assert torch.equal(pages.keys[at], key[3])
        assert torch.equal(pages.values[at], value[3])


def check_swaps(ops: Ops, device: str) -> None:
    """Pages go to the host and come back to other places, bit by bit; nothing else changes."""
    pool = torch.randint(0, 256, (9, 3, 1000), dtype=torch.uint8).to(device)[:, 1]
    host = torch.full((7, 1000), 255, dtype=torch.uint8)
    if pool.is_cuda:
        host = host.pin_memory()
    pages = torch.tensor([8, 0, 3], device=device)
    places = torch.tensor([2, 6, 0], device=device)
    before = pool.clone()
    expected = host.clone()
    expected[places.cpu()] = pool[pages].cpu()
    ops.swap_out(pool, host, pages, places)
    if pool.is_cuda:
        torch.cuda.synchronize()
    assert torch.equal(host, expected)
    assert torch.equal(pool, before)

    targets = torch.tensor([1, 5, 2], device=device)
    ops.swap_in(pool, host, targets, places)
    before[targets] = before[pages]
    assert torch.equal(pool, before)
    assert torch.equal(host, expected)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    for some in (host, host[:0]):
        ops.swap_out(pool, some, nothing, nothing)
        ops.swap_in(pool, some, nothing, nothing)
    ops.swap_out(pool[:, :0], host[:, :0], pages, places)
    assert torch.equal(pool, before)
