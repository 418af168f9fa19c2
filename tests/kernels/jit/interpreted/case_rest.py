"""The other operations, and the shim, in Triton's interpreter; run by test_interpreter.py."""

from __future__ import annotations

import jit_cases
import kernel_cases
import pytest
import torch
import triton
import triton.language as tl

from kernels.errors import ShapeError
from kernels.jit import interpreter_shim
from kernels.ops import Ops

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def ops() -> Ops:
    return jit_cases.make_ops("cpu")


@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "dtype"),
    [(1, 64, 33, BF16), (5, 200, 40, F16), (70, 136, 16, BF16), (17, 40, 70, F32)],
)
def test_linear(
    ops: Ops, rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    jit_cases.check_linear(ops, rows, in_features, out_features, dtype, "cpu")


def test_linear_without_exact() -> None:
    jit_cases.check_linear(jit_cases.make_ops("cpu", exact=False), 3, 72, 20, BF16, "cpu")


def test_int8_linear(ops: Ops) -> None:
    jit_cases.check_int8_linear(ops, 9, 72, 40, BF16, "cpu")
    jit_cases.check_int8_linear(ops, 9, 128, 40, torch.float32, "cpu")
    with pytest.raises(ShapeError, match="int8 weight gives no rows"):
        ops.prepare_int8_linear(torch.ones(4, 8)).rows(torch.tensor([0]))


def test_rows_of_a_linear_do_not_depend_on_each_other(ops: Ops) -> None:
    jit_cases.check_linear_bits(ops, (1, 33, 300), 136, 24, "cpu")


def test_grouped_linear(ops: Ops) -> None:
    jit_cases.check_grouped_linear(ops, 25, 4, "cpu")


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_row_operations(ops: Ops, dtype: torch.dtype) -> None:
    jit_cases.check_rows(ops, 3, 1100, dtype, "cpu")


@pytest.mark.parametrize("page_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rope_store(ops: Ops, dtype: torch.dtype, page_dtype: torch.dtype | None) -> None:
    jit_cases.check_rope_store(ops, 9, dtype, "cpu", page_dtype)


@pytest.mark.parametrize("page_dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_pages_at_the_edges(ops: Ops, page_dtype: torch.dtype) -> None:
    jit_cases.check_quantised_edges(ops, page_dtype, "cpu")


@pytest.mark.parametrize("page_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_store_kv(ops: Ops, dtype: torch.dtype, page_dtype: torch.dtype | None) -> None:
    kernel_cases.check_store_kv(ops, dtype, "cpu", page_dtype)


def test_swaps(ops: Ops) -> None:
    kernel_cases.check_swaps(ops, "cpu")


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_copy_pages(ops: Ops, dtype: torch.dtype) -> None:
    jit_cases.check_copy_pages(ops, dtype, "cpu")


@pytest.mark.parametrize("vocabulary", [1, 100, 4099])
def test_sample(ops: Ops, vocabulary: int) -> None:
    jit_cases.check_sample(ops, 12, vocabulary, "cpu", seed=vocabulary)


@triton.jit
def _arithmetic(out, x, y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + BLOCK + at, a * b)
    tl.store(out + 2 * BLOCK + at, (a > b).to(tl.bfloat16))
    tl.store(out + 3 * BLOCK + at, (a.to(tl.float32) * 1.1).to(tl.bfloat16))


@triton.jit
def _product(out, x, y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    product = tl.dot(tl.load(x + at), tl.load(y + at), input_precision="ieee")
    tl.store(out + at, product)


def test_the_shim_gives_bfloat16_its_arithmetic() -> None:
    interpreter_shim.install()
    x, y = torch.randn(1024).to(BF16), torch.randn(1024).to(BF16)
    out = torch.empty(4, 1024, dtype=BF16)
    _arithmetic[(1,)](out, x, y, BLOCK=1024)
    assert torch.equal(out[0], x + y)
    assert torch.equal(out[1], x * y)
    assert torch.equal(out[2], (x > y).to(BF16))
    assert torch.equal(out[3], (x.float() * 1.1).to(BF16))


def test_the_shim_sums_a_dot_in_an_order_that_no_place_changes() -> None:
    interpreter_shim.install()
    x, y = torch.randn(32, 32).to(BF16), torch.randn(32, 32).to(BF16)
    results = []
    for shift in (0, 5):
        out = torch.empty(32, 32)
        _product[(1,)](out, x.roll(shift, 0), y, BLOCK=32)
        results.append(out.roll(-shift, 0))
    assert torch.equal(results[0], results[1])
    assert kernel_cases.relative_error(results[0], x.double() @ y.double()) < 1e-6


def test_the_shim_is_still_needed() -> None:
    """When this fails, Triton's interpreter has learnt bfloat16, and the shim must change or go."""
    from triton.runtime import interpreter

    assert interpreter._get_np_dtype(tl.bfloat16) == "uint16"
