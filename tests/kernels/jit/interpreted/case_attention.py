"""Attention in Triton's interpreter; run by test_interpreter.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from jit_cases import AttentionCase, check_attention, check_bits, make_ops
from kernel_cases import Heads, check_merge_state, check_states

from kernels.ops import KVPages

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
I8, F8 = torch.int8, torch.float8_e4m3fn


@pytest.mark.parametrize(
    "case",
    [
        # Decode, around the edges of pages and splits.
        AttentionCase((1, 16, 17, 255), (1, 1, 1, 1)),
        AttentionCase((256, 257, 513), (1, 1, 1), num_heads=2, num_kv_heads=1),
        AttentionCase((257, 15), (1, 1), page_size=64, dtype=F16, num_kv_heads=1),
        AttentionCase((40, 257), (1, 1), head_dim=24, page_size=5, num_kv_heads=1, dtype=F32),
        AttentionCase((300,), (1,), num_heads=7, num_kv_heads=1, window=30, soft_cap=20.0),
        AttentionCase((600,), (1,), num_kv_heads=1, window=300, has_sinks=True),
        AttentionCase((257, 31), (1, 1), num_kv_heads=1, soft_cap=5.0, has_sinks=True, dtype=F32),
        # A few queries: the decode kernel, one program for each.
        AttentionCase((270,), (5,), num_kv_heads=1),
        AttentionCase((20, 9, 33), (4, 1, 0), num_kv_heads=1),
        # Prefill and mixed batches.
        AttentionCase((40,), (40,), num_heads=2, num_kv_heads=1),
        AttentionCase((300, 33), (60, 1), num_heads=6, num_kv_heads=2, dtype=F16),
        AttentionCase((80, 257, 19), (33, 1, 2), num_kv_heads=1, window=20, has_sinks=True),
        AttentionCase((270, 5), (40, 1), num_kv_heads=1, head_dim=16, soft_cap=10.0, dtype=F32),
        AttentionCase((40, 3), (20, 3), num_heads=3, num_kv_heads=1, head_dim=256, page_size=128),
        # Quantised pages.
        AttentionCase((1, 17, 255), (1, 1, 1), page_dtype=I8),
        AttentionCase((257, 15), (1, 1), page_size=64, dtype=F16, num_kv_heads=1, page_dtype=I8),
        AttentionCase((257, 31), (1, 1), num_kv_heads=1, soft_cap=5.0, dtype=F32, page_dtype=I8),
        AttentionCase((300, 33), (60, 1), num_heads=6, window=70, dtype=F16, page_dtype=I8),
        AttentionCase((270, 5), (40, 1), num_kv_heads=1, head_dim=24, dtype=F32, page_dtype=I8),
        AttentionCase((40, 257, 3), (20, 1, 3), num_kv_heads=1, has_sinks=True, page_dtype=F8),
        AttentionCase((33,), (33,), num_kv_heads=1, dtype=F32, page_dtype=F8),
    ],
)
def test_against_float64(case: AttentionCase) -> None:
    check_attention(make_ops("cpu"), case, "cpu")


def test_without_exact() -> None:
    case = AttentionCase((290, 30), (40, 1), num_heads=2, num_kv_heads=1)
    check_attention(make_ops("cpu", exact=False), case, "cpu")


@pytest.mark.parametrize(
    ("case", "chunks"),
    [
        (AttentionCase((290, 40), (0, 0), num_heads=2, num_kv_heads=1, head_dim=32), (200,)),
        (AttentionCase((70, 30), (0, 0), num_heads=3, num_kv_heads=1, window=20), (37,)),
        (AttentionCase((270, 30), (0, 0), num_heads=2, num_kv_heads=1, page_dtype=I8), (133,)),
    ],
)
def test_bits_do_not_depend_on_chunks_mates_and_pages(
    case: AttentionCase, chunks: tuple[int, ...]
) -> None:
    check_bits(make_ops("cpu"), case, chunks, "cpu")


@pytest.mark.parametrize(
    ("heads", "dtype", "page_dtype"),
    [
        (Heads(4, 2, 64), BF16, None),
        (Heads(2, 1, 32, window=20, sinks=torch.tensor([3.0, -3.0])), F32, None),
        (Heads(3, 1, 40, soft_cap=5.0), F16, I8),
    ],
)
def test_weights_of_the_means(
    heads: Heads, dtype: torch.dtype, page_dtype: torch.dtype | None
) -> None:
    check_states(make_ops("cpu"), heads, dtype, "cpu", page_dtype)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_merging_parts(dtype: torch.dtype) -> None:
    check_merge_state(make_ops("cpu"), dtype, "cpu")


def test_no_queries() -> None:
    case = AttentionCase((5,), (0,))
    check_attention_is_empty = make_ops("cpu").paged_attention(
        torch.empty(0, 4, 64, dtype=BF16),
        KVPages(torch.empty(1, 2, 16, 64, dtype=BF16), torch.empty(1, 2, 16, 64, dtype=BF16)),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([case.lengths[0]], dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        scale=1.0,
    )
    assert check_attention_is_empty.shape == (0, 4, 64)
