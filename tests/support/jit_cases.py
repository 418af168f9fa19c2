"""Cases for the Triton path that run on a card and, smaller, in Triton's interpreter.

Every tensor a kernel may not read holds NaN: free pages, tails of pages, tails of page tables (they
name a page full of NaN), results before the call. The oracle computes in float64 from the same
rounded inputs.
"""

from __future__ import annotations

import dataclasses
import math
import os

import torch

from kernels.checks import CheckedOps
from kernels.ops import Ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Norm of the error over the norm of the result."""


def make_ops(device: str, *, exact: bool = True) -> Ops:
    """The Triton path on `device`; "cpu" under the interpreter only."""
    from kernels.jit import TritonOps

    if os.environ.get("TRITON_INTERPRET") == "1":
        from kernels.jit import interpreter_shim

        interpreter_shim.install()
    return CheckedOps(TritonOps(device, exact=exact), device)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Infinite where the result isn't finite."""
    wide, wanted = result.double().cpu(), expected.double().cpu()
    if not torch.isfinite(wide).all():
        return math.inf
    return float((wide - wanted).norm() / wanted.norm())


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """A batch by its numbers."""

    lengths: tuple[int, ...]
    """Keys of each sequence, this step's included."""
    queries: tuple[int, ...]
    """Of these, how many are new."""
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Dense inputs, from which batches are cut: rows of several tokens."""

    case: AttentionCase
    queries: list[torch.Tensor]
    """For each sequence `[length, HQ, D]`: a query for every position."""
    keys: list[torch.Tensor]
    """`[length, HKV, D]`"""
    values: list[torch.Tensor]
    sinks: torch.Tensor | None

    @property
    def options(self) -> dict[str, object]:
        return {
            "scale": self.case.head_dim**-0.5,
            "window": self.case.window,
            "soft_cap": self.case.soft_cap,
            "sinks": self.sinks,
        }


def make_sequences(case: AttentionCase, device: str, seed: int) -> Sequences:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(device)

    heads, kv_heads, dim = case.num_heads, case.num_kv_heads, case.head_dim
    return Sequences(
        case,
        [random(length, heads, dim) * 2 for length in case.lengths],
        [random(length, kv_heads, dim) for length in case.lengths],
        [random(length, kv_heads, dim) for length in case.lengths],
        random(heads).float() * 2 if case.has_sinks else None,
    )


def attend(
    ops: Ops,
    sequences: Sequences,
    spans: list[tuple[int, int, int]],
    *,
    page_seed: int = 0,
    width: int = 0,
) -> list[torch.Tensor]:
    """One call over `spans`: (sequence, first, end) are its new positions; `[end - first, HQ, D]`.

    The pool holds exactly the first `end` tokens of each sequence, in pages in random places.
    `width`: least width of the page tables.
    """
    case = sequences.case
    size, device = case.page_size, sequences.keys[0].device
    counts = [-(-end // size) for _, _, end in spans]
    places = torch.randperm(
        sum(counts) + 5, generator=torch.Generator().manual_seed(page_seed)
    ).tolist()
    poison = places.pop()
    shape = (len(places) + 1, 2, 2, case.num_kv_heads, size, case.head_dim)
    pool = torch.full(shape, math.nan, dtype=case.dtype, device=device)
    key_pages, value_pages = pool[:, 1, 0], pool[:, 1, 1]
    tables = torch.full(
        (len(spans), max(*counts, width)), poison, dtype=torch.int32, device=device
    )
    for row, ((sequence, _, end), count) in enumerate(zip(spans, counts, strict=True)):
        pages = [places.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(pages)
        for index, page in enumerate(pages):
            own = slice(index * size, min(end, (index + 1) * size))
            filled = own.stop - own.start
            key_pages[page, :, :filled] = sequences.keys[sequence][own].transpose(0, 1)
            value_pages[page, :, :filled] = sequences.values[sequence][own].transpose(0, 1)
    query = torch.cat([sequences.queries[s][first:end] for s, first, end in spans])
    ends = torch.tensor([end - first for _, first, end in spans]).cumsum(0)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(torch.int32).to(device)
    seq_lens = torch.tensor([end for _, _, end in spans], dtype=torch.int32, device=device)
    before = pool.view(torch.uint8).clone()
    result = ops.paged_attention(
        query, key_pages, value_pages, tables, seq_lens, starts, **sequences.options
    )
    assert torch.equal(pool.view(torch.uint8), before), "attention wrote to the pool"
    return list(result.split([end - first for _, first, end in spans]))


def oracle(sequences: Sequences, sequence: int, first: int, end: int) -> torch.Tensor:
    """What `attend` should give for one span, in float64 on the CPU."""
    case = sequences.case
    group = case.num_heads // case.num_kv_heads
    query = sequences.queries[sequence][first:end].double().cpu()
    key = sequences.keys[sequence][:end].double().cpu().repeat_interleave(group, 1)
    value = sequences.values[sequence][:end].double().cpu().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * case.head_dim**-0.5
    if case.soft_cap is not None:
        scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
    apart = torch.arange(first, end)[:, None] - torch.arange(end)
    visible = (apart >= 0) & (apart < (case.window or end + 1))
    scores = scores.masked_fill(~visible, -math.inf)
    if sequences.sinks is not None:
        sink = sequences.sinks.double().cpu()[:, None, None].expand(-1, end - first, 1)
        weights = torch.cat((scores, sink), 2).softmax(2)[..., :-1]
    else:
        weights = scores.softmax(2)
    return torch.einsum("hqk,khd->qhd", weights, value)


def check_attention(ops: Ops, case: AttentionCase, device: str, seed: int = 0) -> None:
    """The whole batch in one call, against the oracle, sequence by sequence."""
    sequences = make_sequences(case, device, seed)
    spans = [
        (index, length - queries, length)
        for index, (length, queries) in enumerate(zip(case.lengths, case.queries, strict=True))
    ]
    for span, result in zip(spans, attend(ops, sequences, spans, page_seed=seed), strict=True):
        if not len(result):
            continue
        error = relative_error(result, oracle(sequences, *span))
        assert error < TOLERANCE[case.dtype], (case, span, error)


def check_bits(ops: Ops, case: AttentionCase, chunks: tuple[int, ...], device: str) -> None:
    """Sequence 0 from its start: at once, in chunks, by single tokens, with others, elsewhere.

    The other sequences of the case are batch mates with one query each.
    """
    sequences = make_sequences(case, device, seed=1)
    length = case.lengths[0]
    mates = [(index, other - 1, other) for index, other in enumerate(case.lengths) if index]
    whole = attend(ops, sequences, [(0, 0, length)])[0]
    for chunk in chunks:
        for first in range(0, length, chunk):
            end = min(first + chunk, length)
            alone = attend(ops, sequences, [(0, first, end)], page_seed=first + 2)[0]
            assert torch.equal(alone, whole[first:end]), f"chunk {first}..{end}"
            # A wide table makes the host expect more splits than there are.
            spans = [*mates, (0, first, end)]
            batched = attend(ops, sequences, spans, page_seed=first + 3, width=100)[-1]
            assert torch.equal(batched, whole[first:end]), f"chunk {first}..{end} with others"
    for position in sorted({0, 15, 16, 255, 256, 257, length // 2, length - 1}):
        if position < length:
            token = attend(ops, sequences, [*mates, (0, position, position + 1)])[-1]
            assert torch.equal(token, whole[position : position + 1]), f"token {position}"


def check_linear(
    ops: Ops, rows: int, in_features: int, out_features: int, dtype: torch.dtype, device: str
) -> None:
    """Both products against float64, with and without bias, from strided rows."""
    generator = torch.Generator().manual_seed(rows)
    wide = torch.randn(rows, in_features + 16, generator=generator).to(dtype).to(device)
    x = wide[:, :in_features]
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype).to(device)
    bias = torch.randn(out_features, generator=generator).to(dtype).to(device)
    expected = x.double() @ weight.double().T
    for own_bias in (None, bias):
        wanted = expected if own_bias is None else expected + bias.double()
        linear = ops.prepare_linear(weight, own_bias)
        assert relative_error(ops.linear(x, linear), wanted) < TOLERANCE[dtype]
        assert relative_error(ops.linear_float32(x, linear), wanted) < 1e-5


def check_linear_bits(
    ops: Ops, sizes: tuple[int, ...], in_features: int, out_features: int, device: str
) -> None:
    """A row's result is the same among any number of rows, at any place."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(max(sizes), in_features, generator=generator).to(torch.bfloat16).to(device)
    weight = torch.randn(out_features, in_features, generator=generator).to(torch.bfloat16)
    linear = ops.prepare_linear(weight.to(device))
    whole = ops.linear_float32(x, linear)
    for size in sizes:
        for first in {0, len(x) - size, (len(x) - size) // 2}:
            part = ops.linear_float32(x[first : first + size], linear)
            assert torch.equal(part, whole[first : first + size]), (size, first)
