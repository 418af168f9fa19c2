"""What doesn't fit is refused before a pointer is taken, and nothing has changed then."""

import pytest
import torch

from kernels import ShapeError
from kernels.ops import KVPages

PARTS = ("keys", "values", "key_scales", "value_scales")


def linear(ops, **changed):
    given = {"x": torch.zeros(2, 8), "weight": ops.prepare_linear(torch.zeros(3, 8))} | changed
    return ops.linear(**given)


def grouped_linear(ops, **changed):
    given = {
        "x": torch.zeros(2, 8),
        "weights": [ops.prepare_linear(torch.zeros(3, 8)) for _ in range(2)],
        "expert_of_row": torch.tensor([0, 0]),
    } | changed
    experts = ops.prepare_experts(given.pop("weights"))
    return ops.grouped_linear(given["x"], experts, given["expert_of_row"])


def attention(ops, **changed):
    keys, values = torch.zeros(4, 2, 2, 16, 8).unbind(1)
    kept = {"keys": keys, "values": values}
    kept |= {name: changed.pop(name) for name in PARTS if name in changed}
    given = {
        "query": torch.zeros(1, 4, 8),
        "pages": KVPages(**kept),
        "page_tables": torch.zeros(1, 4, dtype=torch.int32),
        "seq_lens": torch.ones(1, dtype=torch.int32),
        "query_starts": torch.tensor([0, 1], dtype=torch.int32),
        "scale": 1.0,
    } | changed
    return ops.paged_attention(**given)


def rope_store(ops, **changed):
    keys, values = torch.zeros(4, 2, 2, 16, 8).unbind(1)
    kept = {"keys": keys, "values": values}
    kept |= {name: changed.pop(name) for name in PARTS if name in changed}
    given = {
        "qkv": torch.zeros(1, 64),
        "positions": torch.zeros(1, dtype=torch.int32),
        "cos_sin": torch.zeros(10, 8),
        "pages": KVPages(**kept),
        "slot_mapping": torch.zeros(1, dtype=torch.int64),
    } | changed
    return ops.rope_store(**given)


def rms_norm(ops, **changed):
    given = {"x": torch.zeros(2, 8), "weight": torch.ones(8), "eps": 1e-6} | changed
    return ops.rms_norm(**given)


def add_rms_norm(ops, **changed):
    given = {
        "x": torch.zeros(2, 8),
        "residual": torch.zeros(2, 8),
        "weight": torch.ones(8),
        "eps": 1e-6,
    } | changed
    return ops.add_rms_norm(**given)


def sample(ops, **changed):
    given = {
        "logits": torch.zeros(1, 5),
        "temperature": torch.ones(1),
        "top_k": torch.zeros(1, dtype=torch.int32),
        "top_p": torch.ones(1),
        "min_p": torch.zeros(1),
        "seeds": torch.zeros(1, dtype=torch.int64),
        "output_indices": torch.zeros(1, dtype=torch.int32),
        "positions": torch.zeros(1, dtype=torch.int32),
    } | changed
    return ops.sample(**given)


def copy_pages(ops, **changed):
    given = {
        "pool": torch.zeros(4, 6),
        "sources": torch.tensor([0]),
        "targets": torch.tensor([1]),
    } | changed
    return ops.copy_pages(**given)


def swap_out(ops, **changed):
    given = {
        "pool": torch.zeros(4, 6),
        "host": torch.zeros(3, 6),
        "pages": torch.tensor([0]),
        "places": torch.tensor([1]),
    } | changed
    return ops.swap_out(**given)


def swap_in(ops, **changed):
    return swap_out(_Turned(ops), **changed)


class _Turned:
    def __init__(self, ops):
        self.swap_out = ops.swap_in


def store_kv(ops, **changed):
    keys, values = torch.zeros(4, 2, 2, 16, 8).unbind(1)
    given = {
        "key": torch.zeros(1, 2, 8),
        "value": torch.zeros(1, 2, 8),
        "pages": KVPages(keys, values),
        "slot_mapping": torch.zeros(1, dtype=torch.int64),
    } | changed
    return ops.store_kv(**given)


def merge_state(ops, **changed):
    given = {
        "out_a": torch.zeros(2, 3, 8),
        "lse_a": torch.zeros(2, 3),
        "out_b": torch.zeros(2, 3, 8),
        "lse_b": torch.zeros(2, 3),
    } | changed
    return ops.merge_state(**given)


WRONG = [
    (linear, "x", torch.zeros(2, 9)),
    (linear, "x", torch.zeros(8)),
    (linear, "x", torch.zeros(2, 8, dtype=torch.float64)),
    (linear, "x", torch.zeros(8, 2).T),
    (grouped_linear, "x", torch.zeros(2, 9)),
    (grouped_linear, "expert_of_row", torch.zeros(3, dtype=torch.int64)),
    (grouped_linear, "expert_of_row", torch.zeros(2, dtype=torch.int32)),
    (rms_norm, "x", torch.zeros(2, 7)),
    (rms_norm, "weight", torch.ones(8, dtype=torch.int32)),
    (add_rms_norm, "residual", torch.zeros(3, 8)),
    (add_rms_norm, "residual", torch.zeros(2, 8, dtype=torch.bfloat16)),
    (attention, "query", torch.zeros(1, 3, 8)),
    (attention, "query", torch.zeros(1, 4, 16)),
    (attention, "query", torch.zeros(1, 0, 8)),
    (attention, "keys", torch.zeros(4, 0, 16, 8)),
    (attention, "keys", torch.zeros(4, 2, 0, 8)),
    (rope_store, "keys", torch.zeros(4, 2, 16, 0)),
    (attention, "keys", torch.zeros(4, 2, 16, 8, dtype=torch.float16)),
    (attention, "keys", torch.zeros(4, 2, 16, 8, dtype=torch.float8_e4m3fn)),
    (attention, "values", torch.zeros(4, 2, 8, 8)),
    (attention, "values", torch.zeros(4, 2, 16, 8, dtype=torch.int8)),
    (attention, "keys", torch.zeros(4, 16, 2, 8).transpose(1, 2)),
    (attention, "key_scales", torch.zeros(4, 2, 16)),
    (rope_store, "value_scales", torch.zeros(4, 2, 16)),
    (attention, "page_tables", torch.zeros(1, 4, dtype=torch.int64)),
    (attention, "seq_lens", torch.ones(2, dtype=torch.int32)),
    (attention, "query_starts", torch.zeros(1, dtype=torch.int32)),
    (attention, "sinks", torch.zeros(3)),
    (attention, "window", 0),
    (attention, "soft_cap", -1.0),
    (rope_store, "qkv", torch.zeros(1, 60)),
    (rope_store, "qkv", torch.zeros(1, 32)),
    (rope_store, "positions", torch.zeros(2, dtype=torch.int32)),
    (rope_store, "cos_sin", torch.zeros(10, 10)),
    (rope_store, "cos_sin", torch.zeros(10, 8, dtype=torch.bfloat16)),
    (rope_store, "slot_mapping", torch.zeros(1, dtype=torch.int32)),
    (rope_store, "q_norm", torch.zeros(7)),
    (sample, "logits", torch.zeros(1, 0)),
    (sample, "logits", torch.zeros(1, 5, dtype=torch.bfloat16)),
    (sample, "top_k", torch.zeros(1, dtype=torch.int64)),
    (sample, "seeds", torch.zeros(2, dtype=torch.int64)),
    (copy_pages, "pool", torch.zeros(4, 6, 2)[:, :, :1]),
    (copy_pages, "targets", torch.tensor([1, 2])),
    (swap_out, "pool", torch.zeros(4, 12)[:, ::2]),
    (swap_out, "host", torch.zeros(3, 7)),
    (swap_out, "host", torch.zeros(3, 6, dtype=torch.int32)),
    (swap_in, "host", torch.zeros(3, 12)[:, ::2]),
    (swap_in, "host", torch.zeros(3, 6, device="meta")),
    (swap_in, "places", torch.tensor([1, 2])),
    (swap_out, "pages", torch.tensor([1], dtype=torch.int32)),
    (store_kv, "key", torch.zeros(1, 2, 16)),
    (store_kv, "value", torch.zeros(1, 3, 8)),
    (store_kv, "value", torch.zeros(1, 2, 8, dtype=torch.bfloat16)),
    (store_kv, "slot_mapping", torch.zeros(2, dtype=torch.int64)),
    (merge_state, "out_a", torch.zeros(2, 8, 3).transpose(1, 2)),
    (merge_state, "out_b", torch.zeros(2, 3, 16)),
    (merge_state, "lse_a", torch.zeros(2, 3, dtype=torch.float64)),
    (merge_state, "lse_b", torch.zeros(3, 2)),
]


@pytest.mark.parametrize(
    ("call", "name", "value"),
    WRONG,
    ids=[f"{c.__name__}-{n}-{i}" for i, (c, n, _) in enumerate(WRONG)],
)
def test_refused_with_the_name(ops, call, name, value):
    call(ops)  # fits as it is
    with pytest.raises(ShapeError, match=name):
        call(ops, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key_scales", None),
        ("value_scales", None),
        ("value_scales", torch.zeros(4, 2, 8)),
        ("key_scales", torch.zeros(4, 2, 16, dtype=torch.bfloat16)),
        ("key_scales", torch.zeros(4, 16, 2).transpose(1, 2)),
    ],
)
def test_quantised_pages_come_with_their_scales(ops, name, value):
    fitting = {
        "keys": torch.zeros(4, 2, 16, 8, dtype=torch.int8),
        "values": torch.zeros(4, 2, 16, 8, dtype=torch.int8),
        "key_scales": torch.zeros(4, 2, 16),
        "value_scales": torch.zeros(4, 2, 16),
    }
    for call in (attention, rope_store):
        call(ops, **fitting)
        with pytest.raises(ShapeError, match=name):
            call(ops, **fitting | {name: value})


def test_a_tensor_on_another_device_is_refused(ops):
    with pytest.raises(ShapeError, match="meta"):
        linear(ops, x=torch.zeros(2, 8, device="meta"))


def test_odd_gates_are_refused(ops):
    with pytest.raises(ShapeError, match="even"):
        ops.silu_mul(torch.zeros(1, 7))


def test_a_weight_of_another_dtype_or_path_is_refused(ops):
    wrong = torch.zeros(2, 8, dtype=torch.bfloat16)
    prepared = ops.prepare_linear(torch.zeros(3, 8))
    whole = ops.prepare_int8_linear(torch.ones(3, 8))
    for weight in (prepared, whole):
        for call in (ops.linear, ops.linear_float32):
            with pytest.raises(ShapeError, match=r"bfloat16.*wanted: torch.float32"):
                call(wrong, weight)
        with pytest.raises(ShapeError, match=r"bfloat16.*wanted: torch.float32"):
            grouped_linear(ops, x=wrong, weights=[weight])

    class Foreign:
        in_features, out_features, dtype, bias, is_int8 = 8, 3, torch.float32, None, False

    with pytest.raises(TypeError, match="Foreign"):
        linear(ops, weight=Foreign())
    with pytest.raises(TypeError, match="Foreign"):
        grouped_linear(ops, weights=[Foreign()])
    with pytest.raises(TypeError, match="Foreign"):
        ops.grouped_linear(torch.zeros(2, 8), Foreign(), torch.tensor([0, 0]))


def test_experts_that_are_not_alike_are_refused(ops):
    def expert(num_rows=3, width=8, *, bias=False, dtype=torch.float32, whole=False):
        prepare = ops.prepare_int8_linear if whole else ops.prepare_linear
        ones = torch.ones(num_rows, dtype=dtype) if bias else None
        return prepare(torch.ones(num_rows, width, dtype=dtype), ones)

    grouped_linear(ops, weights=[expert(), expert()])
    for other in (
        expert(4),
        expert(width=16),
        expert(bias=True),
        expert(dtype=torch.float16),
        expert(whole=True),
    ):
        with pytest.raises(ShapeError, match=r"weights\[1\] is .*wanted: float32 \[3, 8\]"):
            grouped_linear(ops, weights=[expert(), other])
    with pytest.raises(ShapeError, match="at least one expert"):
        grouped_linear(ops, weights=[])


@pytest.mark.parametrize("expert", [-1, 2, 100_000, -(2**63)])
def test_an_expert_that_is_not_there_is_refused(ops, expert):
    with pytest.raises(ShapeError, match="expert_of_row holds"):
        grouped_linear(ops, expert_of_row=torch.tensor([0, expert]))
