"""Cases for the Triton path that run on a card and, smaller, in Triton's interpreter.

The batches, oracles and bounds are those of `kernel_cases`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import weakref

import torch
from kernel_cases import (
    BOUNDS,
    Chunk,
    Heads,
    PagedBatch,
    Sequence,
    attention_oracle,
    random_sequence,
    relative_error,
)
from kv_pages import poisoned_pool, read_pages

from kernels.checks import CheckedOps
from kernels.ops import Ops
from kernels.quantization import int8_rows
from kernels.reference import TorchOps


def make_ops(device: str, *, exact: bool = True) -> Ops:
    """The Triton path on `device`; "cpu" under the interpreter only."""
    from kernels.jit import TritonOps

    if os.environ.get("TRITON_INTERPRET") == "1":
        from kernels.jit import interpreter_shim

        interpreter_shim.install()
    return CheckedOps(TritonOps(device, exact=exact), device)


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
    page_dtype: torch.dtype | None = None
    """What pages hold; `dtype`, if not given."""
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False

    @property
    def tolerance(self) -> float:
        """Weights of quantised values are bfloat16 where queries have 16 bits."""
        if self.dtype == torch.float16 and self.page_dtype is not None:
            return BOUNDS[torch.bfloat16]
        return BOUNDS[self.dtype]


def make_sequences(case: AttentionCase, device: str, seed: int) -> tuple[Heads, list[Sequence]]:
    """What attention looks like in a case, and its sequences, with a query for every position."""
    torch.manual_seed(seed)
    sinks = torch.randn(case.num_heads).to(device) * 2 if case.has_sinks else None
    heads = Heads(
        case.num_heads,
        case.num_kv_heads,
        case.head_dim,
        case.page_size,
        case.window,
        case.soft_cap,
        sinks,
    )
    sequences = [
        random_sequence(heads, length, case.dtype, case.page_dtype, device)
        for length in case.lengths
    ]
    for sequence in sequences:
        sequence.query *= 2
    return heads, sequences


def check_attention(ops: Ops, case: AttentionCase, device: str, seed: int = 0) -> None:
    """The whole batch in one call, against the oracle, sequence by sequence."""
    heads, sequences = make_sequences(case, device, seed)
    chunks = [
        Chunk(sequence, length - queries, length)
        for sequence, length, queries in zip(sequences, case.lengths, case.queries, strict=True)
    ]
    results = PagedBatch(heads, chunks, case.dtype, case.page_dtype).attend_apart(ops)
    for chunk, result in zip(chunks, results, strict=True):
        if not len(result):
            continue
        error = relative_error(result, attention_oracle(heads, chunk))
        assert error < case.tolerance, (case, chunk.begin, chunk.end, error)


def check_bits(ops: Ops, case: AttentionCase, chunks: tuple[int, ...], device: str) -> None:
    """Sequence 0 from its start: at once, in chunks, by single tokens, with others, elsewhere.

    The other sequences of the case are batch mates with one query each.
    """
    heads, sequences = make_sequences(case, device, seed=1)
    first, length = sequences[0], case.lengths[0]
    mates = [Chunk(other, other.length - 1, other.length) for other in sequences[1:]]

    def attend(batch: list[Chunk], width: int = 0) -> torch.Tensor:
        """Of the last chunk."""
        pages = PagedBatch(heads, batch, case.dtype, case.page_dtype, width=width)
        return pages.attend_apart(ops)[-1]

    whole = attend([Chunk(first, 0, length)])
    for chunk in chunks:
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            alone = attend([Chunk(first, begin, end)])
            assert torch.equal(alone, whole[begin:end]), f"chunk {begin}..{end}"
            # A wide table makes the host expect more splits than there are.
            batched = attend([*mates, Chunk(first, begin, end)], width=100)
            assert torch.equal(batched, whole[begin:end]), f"chunk {begin}..{end} with others"
    for position in sorted({0, 15, 16, 255, 256, 257, length // 2, length - 1}):
        if position < length:
            token = attend([*mates, Chunk(first, position, position + 1)])
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
        assert relative_error(ops.linear(x, linear), wanted) < BOUNDS[dtype]
        assert relative_error(ops.linear_float32(x, linear), wanted) < 1e-5


def check_int8_linear(
    ops: Ops, rows: int, in_features: int, out_features: int, dtype: torch.dtype, device: str
) -> None:
    """Both products, and experts', against what the numbers stand for in float64."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, in_features, generator=generator).to(dtype).to(device)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype).to(device)
    bias = torch.randn(out_features, generator=generator).to(dtype).to(device)
    whole, scales = int8_rows(weight)
    expected = x.double() @ (whole.double() * scales.double()[:, None]).T + bias.double()
    linear = ops.prepare_int8_linear(weight, bias)
    assert relative_error(ops.linear(x, linear), expected) < BOUNDS[dtype]
    assert relative_error(ops.linear_float32(x, linear), expected) < 1e-5
    alone = ops.linear(x[-1:], linear)
    assert torch.equal(ops.linear(x, linear)[-1:], alone)
    other = ops.prepare_int8_linear(weight.flip(0), bias)
    chosen = (torch.arange(rows) % 2).to(device)
    grouped = ops.grouped_linear(x, ops.prepare_experts([linear, other]), chosen)
    assert torch.equal(grouped[::2], ops.linear(x, linear)[::2])
    assert torch.equal(grouped[1::2], ops.linear(x, other)[1::2])


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


def check_rows(ops: Ops, rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    """Norms, activations and log-softmax against plain torch, and a row alone bit for bit."""
    reference = TorchOps(device)
    generator = torch.Generator().manual_seed(width)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    wide = random(rows, 2 * width)
    x, residual, weight = wide[:, :width], random(rows, width), random(width)
    for run in (
        lambda path, r: path.rms_norm(x[r], weight, 1e-6, weight_offset=1.0),
        lambda path, r: path.add_rms_norm(x[r], residual[r].clone(), weight, 1e-6),
        lambda path, r: path.silu_mul(wide[r]),
        lambda path, r: path.gelu_mul(wide[r]),
        lambda path, r: path.log_softmax(wide[r].float() * 5),
    ):
        whole = run(ops, slice(0, rows))
        assert relative_error(whole, run(reference, slice(0, rows))) < BOUNDS[dtype]
        assert torch.equal(run(ops, slice(rows - 1, rows)), whole[rows - 1 :])
    changed, expected = residual.clone(), (residual.float() + x.float()).to(dtype)
    ops.add_rms_norm(x, changed, weight, 1e-6)
    assert torch.equal(changed, expected)


def check_rope_store(
    ops: Ops,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    page_dtype: torch.dtype | None = None,
) -> None:
    """Against plain torch; slots that no token was given stay as they were, NaN included."""
    heads, kv_heads, dim, size, rotary = 6, 2, 40, 16, 24
    generator = torch.Generator().manual_seed(tokens)
    num_pages = tokens // size + 3
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim + 8, generator=generator)
    qkv = qkv.to(dtype).to(device)[:, :-8]
    slots = torch.randperm(num_pages * size, generator=generator)[:tokens]
    slots[tokens // 2] = -1
    positions = torch.randint(0, 64, (tokens,), generator=generator, dtype=torch.int32)
    angles = torch.randn(64, rotary // 2, generator=generator)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    norm = torch.randn(dim, generator=generator).to(dtype).to(device)
    for norms in ({}, {"q_norm": norm, "k_norm": norm + 1, "norm_eps": 1e-6}):
        pages, queries = [], []
        for path in (ops, TorchOps(device)):
            _, kv = poisoned_pool(num_pages, kv_heads, size, dim, page_dtype or dtype, device)
            queries.append(
                path.rope_store(
                    qkv,
                    positions.to(device),
                    cos_sin,
                    kv,
                    slots.to(device),
                    **norms,
                )
            )
            pages.append(torch.stack(read_pages(kv)))
        assert relative_error(queries[0], queries[1]) < BOUNDS[dtype]
        assert torch.equal(pages[0].isnan(), pages[1].isnan())
        written = ~pages[1].isnan()
        # A quantised entry may fall on the other side of a tie.
        tolerance = BOUNDS[dtype] if page_dtype is None else max(BOUNDS[dtype], 1e-3)
        assert relative_error(pages[0][written], pages[1][written]) < tolerance


def check_quantised_edges(ops: Ops, page_dtype: torch.dtype, device: str) -> None:
    """Nothing, next to nothing, and what is no number: as plain torch has it, bit by bit."""
    kv = torch.ones(2, 5, 16)
    kv[:, 0] = 0.0
    kv[:, 1] = 1e-39
    kv[:, 2, 7] = math.nan
    kv[:, 3, 15] = -math.inf
    kv[:, 4, ::2] = 0.25
    qkv = torch.cat((torch.zeros(5, 16), kv.flatten(0, 1))).view(1, -1).to(device)
    found = []
    for path in (ops, TorchOps(device)):
        pool, pages = poisoned_pool(2, 5, 4, 16, page_dtype, device)
        path.rope_store(
            qkv,
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.tensor([[1.0, 0.0]], device=device),
            pages,
            torch.tensor([5], device=device),
        )
        found.append((pool, pages))
    assert pages.key_scales is not None
    assert pages.key_scales[1, 2:4, 1].isnan().all()
    assert torch.equal(found[0][0], found[1][0])


def check_copy_pages(ops: Ops, dtype: torch.dtype, device: str) -> None:
    """Bit by bit, in a pool whose pages lie apart."""
    whole = torch.randn(12, 2, 3, 700).to(dtype).to(device)
    whole[3] = math.nan
    pool, expected = whole[:, 1], whole.clone()
    sources, targets = torch.tensor([3, 7], device=device), torch.tensor([1, 9], device=device)
    expected[targets, 1] = whole[sources, 1]
    ops.copy_pages(pool, sources, targets)
    assert torch.equal(whole.view(torch.uint8), expected.view(torch.uint8))


def check_grouped_linear(ops: Ops, rows: int, experts: int, device: str) -> None:
    """Against one product per row, and bit-equal to the linear of a row's expert alone."""
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(device)

    x = random(rows, 72)
    pairs = [(random(40, 72), random(40)) for _ in range(experts)]
    linears = [ops.prepare_linear(*pair) for pair in pairs]
    chosen = torch.randint(0, experts - 1, (rows,), generator=generator)  # the last gets none
    result = ops.grouped_linear(x, ops.prepare_experts(linears), chosen.to(device))
    for row, expert in enumerate(chosen.tolist()):
        weight, bias = pairs[expert]
        wanted = weight.double() @ x[row].double() + bias.double()
        assert relative_error(result[row], wanted) < BOUNDS[torch.bfloat16]
        alone = ops.linear(x[row : row + 1], linears[expert])
        assert torch.equal(result[row : row + 1], alone), (row, expert)
    held = weakref.ref(pairs[0][0])
    del pairs, linears, weight, bias
    assert held() is None  # the operations keep no weight that its owner let go of


def check_sample(ops: Ops, rows: int, vocabulary: int, device: str, seed: int = 0) -> None:
    """The reference's tokens, for random parameters, ties, NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(rows, generator=generator)

    def whole(low: int, high: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, (rows,), generator=generator, dtype=dtype)

    logits = torch.randn(rows, vocabulary, generator=generator) * 4
    logits[0] = logits[0].round()  # many ties
    logits[1, ::3] = math.nan
    logits[2, ::2] = -math.inf
    logits[3] = -math.inf
    arguments = [
        logits,
        torch.where(uniform() < 0.2, 0.0, uniform() * 2),
        torch.where(uniform() < 0.5, 0, whole(1, vocabulary + 2)).to(torch.int32),
        torch.where(uniform() < 0.4, 1.0, uniform()),
        torch.where(uniform() < 0.6, 0.0, uniform() / 4),
        whole(-(2**62), 2**62, torch.int64),
        whole(0, 4),
        whole(0, 1 << 20),
    ]
    drawn = ops.sample(*(argument.to(device) for argument in arguments))
    expected = TorchOps("cpu").sample(*arguments)
    assert torch.equal(drawn.cpu(), expected)
