"""Linears against float64, and their rows bit by bit."""

import pytest
import torch
from kernel_cases import BOUNDS, assert_close, relative_error, rows_alone

from kernels.errors import ShapeError
from kernels.quantization import MAX_INT8_FEATURES, int8_rows

SHAPES = [(1, 1, 8), (2, 5, 24), (3, 33, 100), (7, 64, 1), (13, 130, 96), (64, 40, 515)]


def weight_and_bias(n, k, dtype):
    return (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)


def assert_sums(out, expected, terms, dtype):
    """Within the bound, relative to what sums of such terms have if their signs are random.

    Few sums may all be near 0, with the errors of their terms.
    """
    assert out.shape == expected.shape
    typical = terms.square().sum(-1).sum().sqrt()
    assert (out.double() - expected).norm() <= BOUNDS[dtype] * max(expected.norm(), typical)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_the_product(ops, dtype, m, n, k, biased):
    weight, bias = weight_and_bias(n, k, dtype)
    x = torch.randn(m, k).to(dtype)
    expected = x.double() @ weight.double().T
    terms = x.double()[:, None] * weight.double()
    if biased:
        expected += bias.double()
        terms = torch.cat((terms, bias.double().expand(m, n)[..., None]), dim=2)
    prepared = ops.prepare_linear(weight, bias if biased else None)
    assert (prepared.in_features, prepared.out_features) == (k, n)

    out = ops.linear(x, prepared)
    assert out.dtype == dtype
    assert_sums(out, expected, terms, dtype)

    unrounded = ops.linear_float32(x, prepared)
    assert unrounded.dtype == torch.float32
    assert_sums(unrounded, expected, terms, torch.float32)


def test_no_rows(ops, dtype):
    prepared = ops.prepare_linear(*weight_and_bias(5, 8, dtype))
    assert ops.linear(torch.empty(0, 8, dtype=dtype), prepared).shape == (0, 5)


def test_no_columns_leave_the_bias(ops, dtype):
    bias = torch.randn(5).to(dtype)
    prepared = ops.prepare_linear(torch.empty(5, 0, dtype=dtype), bias)
    assert torch.equal(ops.linear(torch.empty(70, 0, dtype=dtype), prepared), bias.expand(70, 5))
    assert prepared.rows(torch.tensor([4, 0])).shape == (2, 0)


def test_rows_of_a_weight_are_its_embeddings(ops, dtype):
    weight, _ = weight_and_bias(9, 16, dtype)
    prepared = ops.prepare_linear(weight.clone())
    assert torch.equal(prepared.rows(torch.tensor([8, 0, 8])), weight[[8, 0, 8]])


def test_strided_rows(ops, dtype):
    prepared = ops.prepare_linear(*weight_and_bias(11, 32, dtype))
    wide = torch.randn(6, 80).to(dtype)
    wide[:, 32:] = torch.nan
    assert_close(
        ops.linear(wide[:, :32], prepared), ops.linear(wide[:, :32].contiguous(), prepared), dtype
    )


def test_values_next_to_the_weight_are_not_read(exact_ops, dtype):
    # A lane past the end of a row must add nothing, even where NaN lies there.
    for k in range(1, 70):
        stored = torch.full((7 * k + 64,), torch.nan).to(dtype)
        stored[: 7 * k] = torch.randn(7 * k)
        x = torch.full((3, k + 40), torch.nan).to(dtype)
        x[:, :k] = torch.randn(3, k)
        weight = stored[: 7 * k].view(7, k)
        out = exact_ops.linear_float32(x[:, :k], exact_ops.prepare_linear(weight))
        assert_close(out, x[:, :k].double() @ weight.double().T, torch.float32)


@pytest.mark.parametrize("k", [40, 129, 512])
def test_a_row_is_the_same_among_any_others(on_threads, dtype, k):
    """M = 1..64, any place in a tile, one thread or three: equal bits."""
    weight, bias = weight_and_bias(75, k, dtype)
    x = torch.randn(64, k).to(dtype)
    alone = rows_alone(
        on_threads(1), on_threads(3), lambda ops: ops.prepare_linear(weight, bias), x
    )
    ops = on_threads(1)
    assert torch.equal(ops.linear(x, ops.prepare_linear(weight, bias)), alone.to(dtype))


@pytest.mark.parametrize(("m", "n", "k"), [(100, 700, 640), (451, 70, 640), (900, 20, 16)])
def test_threads_share_a_large_linear_bit_for_bit(on_threads, dtype, m, n, k):
    """Large enough for several blocks of columns, of rows, or of both."""
    weight, _ = weight_and_bias(n, k, dtype)
    x = torch.randn(m, k).to(dtype)
    results = []
    for threads in (1, 2, 5):
        ops = on_threads(threads)
        results.append(ops.linear_float32(x, ops.prepare_linear(weight)))
    assert_close(results[0], x.double() @ weight.double().T, torch.float32)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("n", "k"), [(1, 1), (15, 3), (16, 64), (33, 100), (200, 31)])
def test_any_row_of_a_weight_comes_back_as_it_was(ops, dtype, n, k):
    weight, _ = weight_and_bias(n, k, dtype)
    prepared = ops.prepare_linear(weight.clone())
    ids = torch.cat((torch.randperm(n), torch.arange(n)))
    assert torch.equal(prepared.rows(ids), weight[ids])
    assert prepared.rows(ids[:0]).shape == (0, k)


@pytest.mark.parametrize("ids", [[-1], [0, 9]])
def test_a_row_that_a_weight_does_not_have_is_refused(exact_ops, dtype, ids):
    prepared = exact_ops.prepare_linear(weight_and_bias(9, 16, dtype)[0])
    with pytest.raises(IndexError, match="outside 0 to 8"):
        prepared.rows(torch.tensor(ids))


def test_more_rows_than_are_packed_at_once(exact_ops, dtype):
    weight, bias = weight_and_bias(5, 2048, dtype)
    x = torch.randn(5000, 2048).to(dtype)
    prepared = exact_ops.prepare_linear(weight, bias)
    out = exact_ops.linear_float32(x, prepared)
    assert_close(out, x.double() @ weight.double().T + bias.double(), torch.float32)
    some = torch.tensor([0, 2047, 2048, 4095, 4096, 4999])
    assert torch.equal(exact_ops.linear_float32(x[some], prepared), out[some])
    where = torch.arange(5000) % 2
    other = exact_ops.prepare_linear(weight_and_bias(5, 2048, dtype)[0], bias)
    grouped = exact_ops.grouped_linear(x, exact_ops.prepare_experts([prepared, other]), where)
    assert torch.equal(grouped[::2], exact_ops.linear(x[::2], prepared))
    assert torch.equal(grouped[1::2], exact_ops.linear(x[1::2], other))


@pytest.mark.parametrize("biased", [False, True])
def test_grouped_linear_sends_each_row_to_its_expert(ops, dtype, biased):
    parts = [weight_and_bias(19, 48, dtype) for _ in range(5)]
    experts = [ops.prepare_linear(w, b if biased else None) for w, b in parts]
    x = torch.randn(30, 48).to(dtype)
    chosen = torch.randint(0, 4, (30,))  # expert 4 gets none
    expected = torch.stack(
        [
            x[r].double() @ parts[e][0].double().T + (parts[e][1].double() if biased else 0)
            for r, e in enumerate(chosen.tolist())
        ]
    )
    assert_close(ops.grouped_linear(x, ops.prepare_experts(experts), chosen), expected, dtype)


def test_grouped_linear_is_the_linear_of_its_expert_bit_for_bit(exact_ops, dtype):
    experts = [exact_ops.prepare_linear(*weight_and_bias(19, 48, dtype)) for _ in range(3)]
    x = torch.randn(40, 48).to(dtype)
    chosen = torch.randint(0, 3, (40,))
    out = exact_ops.grouped_linear(x, exact_ops.prepare_experts(experts), chosen)
    for r, e in enumerate(chosen.tolist()):
        assert torch.equal(out[r : r + 1], exact_ops.linear(x[r : r + 1], experts[e]))


def stands_for(weight):
    """What an int8 weight's numbers stand for, float64."""
    whole, scales = int8_rows(weight)
    return whole.double() * scales.double()[:, None]


def assert_near(out, x, weight, bias, dtype):
    """Each element as close as x in 16 bits allows, and what the dtype rounds."""
    assert out.dtype == dtype
    x, weight = x.double(), stands_for(weight)
    bias = torch.zeros(len(weight)).double() if bias is None else bias.double()
    expected = x @ weight.T + bias
    halves = x.abs().amax(1, keepdim=True) / 65534 * weight.abs().sum(1)
    terms = x.abs() @ weight.abs().T + bias.abs()
    limits = torch.finfo(dtype)
    subnormal = limits.smallest_normal * limits.eps  # what the smallest results are multiples of
    allowed = 1.01 * halves + BOUNDS[dtype] * expected.abs() + 1e-6 * terms + subnormal
    assert ((out.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_an_int8_linear_is_the_product_of_what_its_numbers_stand_for(ops, dtype, m, n, k, biased):
    weight, bias = weight_and_bias(n, k, dtype)
    bias = bias if biased else None
    x = torch.randn(m, k).to(dtype)
    prepared = ops.prepare_int8_linear(weight, bias)
    assert (prepared.in_features, prepared.out_features) == (k, n)
    assert_near(ops.linear(x, prepared), x, weight, bias, dtype)
    assert_near(ops.linear_float32(x, prepared), x, weight, bias, torch.float32)
    with pytest.raises(ShapeError, match="int8 weight gives no rows"):
        prepared.rows(torch.arange(n))


@pytest.mark.parametrize("outlier", [1, 100, 1000])
def test_the_largest_element_sets_the_step_of_its_own_row_alone(ops, dtype, outlier):
    """The first outputs are an element of x each: nothing averages what their rounding costs."""
    k = 96
    x = torch.randn(3, k).to(dtype)
    x[1, 5] = outlier
    weight = torch.cat((torch.eye(k), torch.randn(33, k) / k**0.5)).to(dtype)
    out = ops.linear_float32(x, ops.prepare_int8_linear(weight)).double()
    x, weight = x.double(), stands_for(weight)
    half_steps = x.abs().amax(1, keepdim=True) / 32767 / 2
    allowed = half_steps * weight.abs().sum(1)
    summed = 1e-6 * (x.abs() @ weight.abs().T)  # what float32 rounds
    assert ((out - x @ weight.T).abs() <= allowed + summed).all()


@pytest.mark.parametrize("k", [40, 515])
def test_a_row_of_an_int8_linear_is_the_same_among_any_others(on_threads, dtype, k):
    weight, bias = weight_and_bias(75, k, dtype)
    x = torch.randn(64, k).to(dtype) * torch.logspace(-3, 3, 64)[:, None].to(dtype)
    ops = on_threads(1)
    rows_alone(on_threads(1), on_threads(3), lambda ops: ops.prepare_int8_linear(weight, bias), x)
    prepared = ops.prepare_int8_linear(weight, bias)
    experts = [prepared, ops.prepare_int8_linear(weight.flip(0), bias)]
    chosen = torch.arange(64) % 2
    grouped = ops.grouped_linear(x, ops.prepare_experts(experts), chosen)
    assert torch.equal(grouped[::2], ops.linear(x[::2], experts[0]))
    assert torch.equal(grouped[1::2], ops.linear(x[1::2], experts[1]))


def test_the_largest_sums_of_an_int8_linear_fit(exact_ops):
    k = MAX_INT8_FEATURES
    x, weight = torch.ones(2, k), torch.ones(3, k)
    weight[1], x[1] = -1, -1
    prepared = exact_ops.prepare_int8_linear(weight)
    expected = torch.tensor([[k, -k, k], [-k, k, -k]])
    sums = exact_ops.linear_float32(x, prepared)
    assert relative_error(sums, expected) <= BOUNDS[torch.float32]
    assert_near(sums, x, weight, None, torch.float32)
    with pytest.raises(ShapeError, match=f"{k + 1} columns.*{k}"):
        exact_ops.prepare_int8_linear(torch.ones(1, k + 1))


def test_what_is_not_finite_spoils_its_own_row_alone(exact_ops, dtype):
    weight, _ = weight_and_bias(20, 64, dtype)
    prepared = exact_ops.prepare_int8_linear(weight)
    x = torch.randn(5, 64).to(dtype)
    expected = exact_ops.linear_float32(x, prepared)
    x[1, 3], x[3, 9] = torch.nan, torch.inf
    out = exact_ops.linear_float32(x, prepared)
    assert not out[[1, 3]].isfinite().any()
    assert torch.equal(out[[0, 2, 4]], expected[[0, 2, 4]])
    zeros = exact_ops.prepare_int8_linear(torch.zeros(4, 64).to(dtype))
    assert torch.equal(exact_ops.linear_float32(x[:1] * 0, prepared), torch.zeros(1, 20))
    assert torch.equal(exact_ops.linear_float32(x[:1], zeros), torch.zeros(1, 4))
    weight[2, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        exact_ops.prepare_int8_linear(weight)
