"""Norms, gated activations, softmax, page copies and swaps."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from kernel_cases import assert_close, check_swaps

WIDTHS = [1, 7, 16, 31, 100, 1024, 1031]


def rms_norm_oracle(x, weight, eps, offset):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(ops, dtype, width):
    x, weight = torch.randn(5, width).to(dtype) * 3, torch.randn(width).to(dtype)
    for offset in (0.0, 1.0):
        out = ops.rms_norm(x, weight, 1e-5, weight_offset=offset)
        assert_close(out, rms_norm_oracle(x, weight, 1e-5, offset), dtype)
    # Gemma keeps float32 weights beside bfloat16 activations.
    assert_close(ops.rms_norm(x, weight.float(), 1e-5), out_of(x, weight), dtype)


def out_of(x, weight):
    return rms_norm_oracle(x, weight, 1e-5, 0.0)


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_rounds_the_sum_then_norms_it(ops, dtype, width):
    wide = torch.randn(4, 2 * width).to(dtype)
    x, residual = torch.randn(4, width).to(dtype), wide[:, :width]
    beside = wide[:, width:].clone()
    expected_residual = (residual.float() + x.float()).to(dtype)
    out = ops.add_rms_norm(x, residual, torch.ones(width).to(dtype), 1e-6)
    assert torch.equal(residual, expected_residual)
    assert torch.equal(wide[:, width:], beside)
    expected = rms_norm_oracle(expected_residual, torch.ones(width), 1e-6, 0.0)
    assert_close(out, expected, dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_gated_activations(ops, dtype, width):
    gate_up = torch.randn(6, 2 * width).to(dtype) * 4
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(ops.silu_mul(gate_up), F.silu(gate) * up, dtype)
    assert_close(ops.gelu_mul(gate_up), F.gelu(gate, approximate="tanh") * up, dtype)


def test_gates_at_the_ends_of_the_range(ops):
    gate = torch.tensor([[-1e30, -200.0, -87.5, -1e-30, 0.0, 1e-30, 88.5, 200.0, 1e30]])
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    for out, expected in (
        (ops.silu_mul(gate_up), F.silu(gate.double())),
        (ops.gelu_mul(gate_up), F.gelu(gate.double(), approximate="tanh")),
    ):
        assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("width", [1, 16, 33, 5000])
def test_log_softmax(ops, width):
    logits = torch.randn(4, width) * 10
    logits[1, 0] = 1e4
    expected = logits.double().log_softmax(-1)
    out = ops.log_softmax(logits)
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_log_softmax_of_forbidden_tokens(ops):
    logits = torch.randn(3, 50)
    logits[:, ::3] = -torch.inf
    out = ops.log_softmax(logits)
    assert (out[:, ::3] == -torch.inf).all()
    assert torch.allclose(out.exp().sum(-1), torch.ones(3))


@pytest.mark.parametrize("width", [48, 1003])
def test_a_row_is_the_same_among_any_others(on_threads, dtype, width):
    x, weight = torch.randn(70, 2 * width).to(dtype), torch.randn(2 * width).to(dtype)
    logits = torch.randn(70, width)
    for run in (
        lambda ops, rows: ops.rms_norm(x[rows], weight, 1e-6),
        lambda ops, rows: ops.silu_mul(x[rows]),
        lambda ops, rows: ops.gelu_mul(x[rows]),
        lambda ops, rows: ops.log_softmax(logits[rows]),
    ):
        whole = run(on_threads(1), slice(0, 70))
        assert torch.equal(run(on_threads(3), slice(0, 70)), whole)
        for begin, end in ((0, 1), (69, 70), (33, 50)):
            assert torch.equal(run(on_threads(2), slice(begin, end)), whole[begin:end])


def test_a_value_is_the_same_in_any_lane(exact_ops, dtype):
    """Body and tail of a row are one code."""
    value = torch.randn(1).to(dtype)
    for width in range(1, 40):
        gate_up = value.expand(1, 2 * width).contiguous()
        for out in (exact_ops.silu_mul(gate_up), exact_ops.gelu_mul(gate_up)):
            assert out.unique().numel() == 1


@pytest.mark.parametrize("num_pairs", [0, 1, 7])
def test_copy_pages(ops, dtype, num_pairs):
    pool = torch.randn(20, 3, 2, 5).to(dtype)
    places = torch.randperm(20)
    sources, targets = places[:num_pairs], places[num_pairs : 2 * num_pairs]
    expected = pool.clone()
    expected[targets] = pool[sources]
    ops.copy_pages(pool, sources, targets)
    assert torch.equal(pool, expected)


def test_copy_pages_of_a_strided_pool(ops):
    whole = torch.randn(6, 2, 4, 3)
    expected = whole.clone()
    expected[5, 0] = whole[1, 0]
    ops.copy_pages(whole[:, 0], torch.tensor([1]), torch.tensor([5]))
    assert torch.equal(whole, expected)


def test_rows_without_width(ops, dtype):
    """Nothing to compute, and nothing to divide by."""
    empty = torch.empty(3, 0, dtype=dtype)
    assert ops.silu_mul(empty).shape == (3, 0)
    assert ops.gelu_mul(empty).shape == (3, 0)
    assert ops.rms_norm(empty, torch.empty(0, dtype=dtype), 1e-6).shape == (3, 0)
    assert ops.add_rms_norm(empty, empty, torch.empty(0, dtype=dtype), 1e-6).shape == (3, 0)
    ops.copy_pages(torch.empty(4, 0, dtype=dtype), torch.tensor([0]), torch.tensor([1]))


def test_swaps(ops):
    check_swaps(ops, "cpu")


@pytest.mark.parametrize(
    "make",
    [
        torch.empty_like,
        lambda x: x.new_empty(x.shape),
        lambda x: torch.empty(x.shape, dtype=x.dtype),
    ],
)
def test_no_output_begins_as_anything_but_poison(make) -> None:
    """Of the kernels' tests: each way by which a path gets memory for its results."""
    assert make(torch.zeros(5, 7, dtype=torch.bfloat16)).isnan().all()
    assert (make(torch.zeros(5, dtype=torch.int64)) == torch.iinfo(torch.int64).max).all()
