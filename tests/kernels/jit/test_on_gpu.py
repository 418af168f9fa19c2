"""The interpreter's cases on a card, at full size. `pytest -m gpu`."""

from __future__ import annotations

import jit_cases
import kernel_cases
import pytest
import torch
from jit_cases import AttentionCase
from kernel_cases import Heads

from kernels.ops import KVPages, Ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EDGES = (1, 15, 16, 17, 255, 256, 257, 513)


@pytest.fixture
def ops() -> Ops:
    return jit_cases.make_ops("cuda")


FEATURES = [
    {},
    {"window": 100},
    {"window": 300, "has_sinks": True},
    {"soft_cap": 20.0},
    {"soft_cap": 5.0, "window": 64, "has_sinks": True},
]


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("head_dim", [24, 64, 128, 256])
def test_attention_against_float64(
    ops: Ops, head_dim: int, dtype: torch.dtype, features: dict[str, object]
) -> None:
    for group, page_size in ((1, 16), (4, 64), (7, 16), (8, 128)):
        heads = {"num_heads": 2 * group, "num_kv_heads": 2, "head_dim": head_dim}
        more = {"page_size": page_size, "dtype": dtype, **features}
        decode = AttentionCase(EDGES, (1,) * len(EDGES), **heads, **more)
        prefill = AttentionCase(EDGES, EDGES, **heads, **more)
        mixed = AttentionCase((700, 300, 90, 1000), (1, 200, 90, 5), **heads, **more)
        for case in (decode, prefill, mixed):
            jit_cases.check_attention(ops, case, "cuda", seed=group)


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, BF16), (128, BF16), (256, BF16), (64, F32)])
def test_attention_bits_do_not_depend_on_chunks_mates_and_pages(
    ops: Ops, head_dim: int, dtype: torch.dtype, features: dict[str, object]
) -> None:
    case = AttentionCase(
        (1100, 40, 700),
        (0, 0, 0),
        num_heads=8,
        num_kv_heads=2,
        head_dim=head_dim,
        dtype=dtype,
        **features,
    )
    jit_cases.check_bits(ops, case, (37, 64, 300), "cuda")


def test_attention_without_exact() -> None:
    ops = jit_cases.make_ops("cuda", exact=False)
    for head_dim in (64, 128, 256):
        case = AttentionCase((700, 300, 90), (1, 200, 90), head_dim=head_dim)
        jit_cases.check_attention(ops, case, "cuda")


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("rows", [1, 16, 33, 65, 300])
def test_linear(ops: Ops, rows: int, dtype: torch.dtype) -> None:
    for in_features, out_features in ((64, 33), (200, 40), (1024, 4096), (4096, 1000)):
        jit_cases.check_linear(ops, rows, in_features, out_features, dtype, "cuda")


@pytest.mark.parametrize("out_features", [1000, 4096, 28672])
def test_rows_of_a_linear_do_not_depend_on_each_other(ops: Ops, out_features: int) -> None:
    sizes = (1, 7, 16, 33, 64, 65, 200, 256, 257, 700)
    jit_cases.check_linear_bits(ops, sizes, 4096, out_features, "cuda")


@pytest.mark.parametrize(("rows", "experts"), [(1, 2), (50, 8), (700, 128)])
def test_grouped_linear(ops: Ops, rows: int, experts: int) -> None:
    jit_cases.check_grouped_linear(ops, rows, experts, "cuda")


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("width", [7, 1024, 5120, 14336])
def test_row_operations(ops: Ops, width: int, dtype: torch.dtype) -> None:
    jit_cases.check_rows(ops, 33, width, dtype, "cuda")


@pytest.mark.parametrize("page_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_rope_store(ops: Ops, dtype: torch.dtype, page_dtype: torch.dtype | None) -> None:
    _skip_unless(ops, page_dtype)
    jit_cases.check_rope_store(ops, 200, dtype, "cuda", page_dtype)


@pytest.mark.parametrize("page_dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_pages(ops: Ops, page_dtype: torch.dtype) -> None:
    _skip_unless(ops, page_dtype)
    jit_cases.check_quantised_edges(ops, page_dtype, "cuda")
    for dtype in (BF16, F16, F32):
        case = AttentionCase((700, 1, 257), (90, 1, 1), dtype=dtype, page_dtype=page_dtype)
        jit_cases.check_attention(ops, case, "cuda")
    case = AttentionCase((600, 40), (0, 0), head_dim=128, page_dtype=page_dtype)
    jit_cases.check_bits(ops, case, (200, 37), "cuda")


def _skip_unless(ops: Ops, page_dtype: torch.dtype | None) -> None:
    if page_dtype is not None and page_dtype not in ops.page_dtypes:
        pytest.skip(f"{ops.name} keeps no pages of {page_dtype}")


@pytest.mark.parametrize("page_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_store_kv(ops: Ops, dtype: torch.dtype, page_dtype: torch.dtype | None) -> None:
    _skip_unless(ops, page_dtype)
    kernel_cases.check_store_kv(ops, dtype, "cuda", page_dtype)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_weights_of_means_and_merging(ops: Ops, dtype: torch.dtype) -> None:
    for heads in (Heads(8, 2, 128), Heads(4, 2, 64, window=50), Heads(2, 1, 40, soft_cap=5.0)):
        kernel_cases.check_states(ops, heads, dtype, "cuda")
    kernel_cases.check_merge_state(ops, dtype, "cuda")


def test_swaps(ops: Ops) -> None:
    kernel_cases.check_swaps(ops, "cuda")


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_copy_pages(ops: Ops, dtype: torch.dtype) -> None:
    jit_cases.check_copy_pages(ops, dtype, "cuda")


@pytest.mark.parametrize("vocabulary", [1, 100, 32000, 151936])
def test_sample(ops: Ops, vocabulary: int) -> None:
    jit_cases.check_sample(ops, 64, vocabulary, "cuda", seed=vocabulary)


def test_decode_steps_replay_in_a_graph(ops: Ops) -> None:
    """Launches read lengths and tables at replay: one captured step serves later ones."""
    heads, kv_heads, dim, size, num_seqs = 8, 2, 64, 16, 3
    pages = torch.randn(64, 2, 2, kv_heads, size, dim, device="cuda", dtype=BF16)
    query = torch.randn(num_seqs, heads, dim, device="cuda", dtype=BF16)
    tables = torch.arange(60, device="cuda", dtype=torch.int32).view(num_seqs, 20)
    seq_lens = torch.full((num_seqs,), 5, device="cuda", dtype=torch.int32)
    starts = torch.arange(num_seqs + 1, device="cuda", dtype=torch.int32)

    def step() -> torch.Tensor:
        arguments = (query, KVPages(pages[:, 0, 0], pages[:, 0, 1]), tables, seq_lens, starts)
        return ops.paged_attention(*arguments, scale=0.125)

    replay = ops.capture(step)
    assert replay is not None
    for lengths in ((5, 300, 320), (256, 1, 257)):
        seq_lens.copy_(torch.tensor(lengths))
        query.normal_()
        assert torch.equal(replay(), step())
