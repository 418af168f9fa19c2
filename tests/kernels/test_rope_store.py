"""Split, normalise, rotate, store: against float64, with every other slot left as it was."""

import pytest
import torch
from kernel_cases import assert_close, check_store_kv
from kv_pages import poisoned_pool

from kernels.ops import QUANTISED, KVPages
from kernels.reference import TorchOps
from kernels.reference.torch_ops import quantise


def oracle(x, positions, cos_sin, weight, eps, offset):
    """`[T, heads, D]` in float64."""
    x = x.double()
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())
    half = cos_sin.shape[1] // 2
    cos = cos_sin[positions.long(), None, :half].double()
    sin = cos_sin[positions.long(), None, half:].double()
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]), dim=-1)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("hq", "hkv", "d", "rotary", "page_size"),
    [
        (4, 2, 16, 16, 4),
        (2, 1, 8, 4, 1),
        (3, 3, 80, 32, 16),
        (8, 1, 128, 128, 16),
        (2, 2, 40, 0, 5),
    ],
)
def test_queries_turn_and_keys_and_values_are_stored(
    ops, dtype, hq, hkv, d, rotary, page_size, normed
):
    tokens, num_pages = 23, 9
    wide = torch.randn(tokens, (hq + 2 * hkv) * d + 8).to(dtype)
    qkv = wide[:, : (hq + 2 * hkv) * d]
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32)
    angle = torch.rand(50, rotary // 2) * 6.3
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
    pool = torch.randn(num_pages, 2, 2, hkv, page_size, d).to(dtype)
    pages = KVPages(pool[:, 1, 0], pool[:, 1, 1])
    slots = torch.randperm(num_pages * page_size)[:tokens]
    if slots.shape[0] < tokens:
        slots = torch.cat((slots, torch.full((tokens - slots.shape[0],), -1)))
    slots[torch.randint(0, tokens, (4,))] = -1
    norms = [torch.randn(d).to(dtype), torch.randn(d).to(dtype)] if normed else [None, None]

    expected_pool = pool.clone()
    out = ops.rope_store(
        qkv, positions, cos_sin, pages, slots,
        q_norm=norms[0], k_norm=norms[1], norm_eps=1e-5, norm_weight_offset=0.5,
    )  # fmt: skip

    heads = qkv.reshape(tokens, hq + 2 * hkv, d)
    assert_close(out, oracle(heads[:, :hq], positions, cos_sin, norms[0], 1e-5, 0.5), dtype)
    keys = oracle(heads[:, hq : hq + hkv], positions, cos_sin, norms[1], 1e-5, 0.5)
    stored = []
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, place = divmod(slot, page_size)
        stored.append((t, page, place))
        # Values are copied; keys are compared below, and taken over here for the last comparison.
        expected_pool[page, 1, 1, :, place] = heads[t, hq + hkv :]
        expected_pool[page, 1, 0, :, place] = pages.keys[page, :, place]
    got = torch.stack([pages.keys[page, :, place] for _, page, place in stored])
    assert_close(got, keys[[t for t, _, _ in stored]], dtype)
    assert torch.equal(pool, expected_pool)


def test_a_token_is_turned_the_same_among_any_others(on_threads, dtype):
    tokens, hq, hkv, d = 90, 4, 2, 72
    qkv = torch.randn(tokens, (hq + 2 * hkv) * d).to(dtype)
    positions = torch.arange(tokens, dtype=torch.int32)
    cos_sin = torch.randn(tokens, d)
    norm = torch.randn(d).to(dtype)

    def run(ops, rows):
        pool = torch.zeros(tokens, 2, hkv, 1, d, dtype=dtype)
        slots = torch.arange(tokens)[rows]
        out = ops.rope_store(
            qkv[rows], positions[rows], cos_sin, KVPages(pool[:, 0], pool[:, 1]), slots,
            q_norm=norm, k_norm=norm, norm_eps=1e-6,
        )  # fmt: skip
        return out, pool[slots]

    whole = run(on_threads(1), slice(0, tokens))
    again = run(on_threads(3), slice(0, tokens))
    part = run(on_threads(2), slice(41, 48))
    for i in range(2):
        assert torch.equal(whole[i], again[i])
        assert torch.equal(whole[i][41:48], part[i])


def test_keys_and_values_are_stored_as_they_are(ops, dtype, page_dtype):
    check_store_kv(ops, dtype, "cpu", page_dtype)


def stored(ops, kv, page_dtype, dtype=torch.float32):
    """Pages whose slot 5 alone was given `kv [2, HKV, D]`: keys and values, without rotation."""
    _, num_kv_heads, head_dim = kv.shape
    _, pages = poisoned_pool(2, num_kv_heads, 4, head_dim, page_dtype)
    qkv = torch.cat((torch.zeros(num_kv_heads, head_dim), kv.flatten(0, 1))).view(1, -1).to(dtype)
    ops.rope_store(
        qkv,
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([[1.0, 0.0]]),
        pages,
        torch.tensor([5]),
    )
    rest = pages.key_scales.clone()
    rest[1, :, 1] = torch.nan
    assert rest.isnan().all(), "another slot was written"
    return pages


@pytest.mark.parametrize("page_dtype", QUANTISED, ids=str)
def test_quantised_entries_are_within_half_a_step(dtype, page_dtype):
    """Of plain torch, whose bits the others have (`check_store_kv`)."""
    x = (torch.randn(6, 3, 72) * torch.logspace(-6, 4, 3)[:, None]).to(dtype)
    entries, scales = quantise(x, page_dtype)
    x = x.float()
    assert torch.allclose(scales, x.abs().amax(-1) / QUANTISED[page_dtype], rtol=1e-6, atol=0)
    steps = scales.unsqueeze(-1)
    if page_dtype != torch.int8:
        steps = x.abs() / 8 + steps * 2**-9
    assert ((entries.float() * scales.unsqueeze(-1) - x).abs() <= 0.5001 * steps).all()
    # The largest is as large as the dtype allows, and nothing is shared between heads.
    assert (entries.float().abs().amax(dim=-1) == QUANTISED[page_dtype]).all()


@pytest.mark.parametrize("page_dtype", TorchOps.page_dtypes, ids=str)
def test_vectors_without_a_scale(ops, page_dtype):
    kv = torch.ones(2, 5, 40)
    kv[:, 0] = 0.0
    kv[:, 1] = 1e-39
    kv[:, 2, 17] = torch.nan
    kv[:, 3, 39] = -torch.inf
    pages = stored(ops, kv, page_dtype)
    for scales, entries in ((pages.key_scales, pages.keys), (pages.value_scales, pages.values)):
        own = scales[1, :, 1]
        assert own[:2].tolist() == [0.0, 0.0]
        assert own[2:4].isnan().all(), "what is no number must show"
        assert own[4] > 0
        assert not entries[1, :4, 1].float().any()
        assert (entries[1, 4, 1].float() == QUANTISED[page_dtype]).all()
