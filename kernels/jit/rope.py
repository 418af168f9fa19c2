"""Between the QKV projection and attention: head norms, rotation, and the store to the pages.

One pass over the projection's output (Su et al. 2021 for the rotation, two-halves layout).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.jit.launch import Launch, Schedule
from kernels.ops import QUANTISED, KVPages

_BLOCK_H = 8
"""Heads of one program."""


@triton.jit
def _quantise(x, MOST: tl.constexpr):
    """Entries and scales of rows, as `kernels.ops.KVPages` defines them; entries in float32."""
    size = tl.abs(x)
    # Infinite where anything is no finite number: a maximum alone would overlook NaN.
    amax = tl.max(tl.where(size < float("inf"), size, float("inf")), 1)
    scale = amax / MOST
    is_normal = (scale >= 1.1754943508222875e-38) & (amax < float("inf"))
    divisor = tl.where(is_normal, scale, 1.0)
    entry = tl.where(is_normal[:, None], x / divisor[:, None], 0.0)
    if MOST == 127.0:
        # Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even.
        entry = (entry + 12582912.0) - 12582912.0
    scale = tl.where(is_normal, scale, 0.0)
    return entry, tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def _entries(x, MOST: tl.constexpr):
    """Rows as pages hold them; their scales unless MOST is 0, then anything."""
    if MOST > 0:
        return _quantise(x.to(tl.float32), MOST)
    else:
        return x, x


@triton.jit
def _put(pages, scales, entry, scale, at, scale_at, mask, in_head, MOST: tl.constexpr):
    """The rows of `mask` to `at` in the pages."""
    to = mask[:, None] & in_head[None, :]
    tl.store(pages + at, entry.to(pages.dtype.element_ty), mask=to)
    if MOST > 0:
        tl.store(scales + scale_at, scale, mask=mask)


@triton.jit
def store_kv_kernel(
    key,
    value,
    key_pages,
    value_pages,
    key_scales,
    value_scales,
    slot_mapping,
    key_stride,
    value_stride,
    key_page_stride,
    value_page_stride,
    scale_page_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program (token, BLOCK_H of its heads). MOST as in `rope_store_kernel`."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    is_head, in_head = head < KV_HEADS, column < HEAD_DIM
    mask = is_head[:, None] & in_head[None, :]
    source = head[:, None] * HEAD_DIM + column[None, :]
    page = slot // PAGE_SIZE
    row = head * PAGE_SIZE + slot % PAGE_SIZE
    at = row[:, None] * HEAD_DIM + column[None, :]
    scale_at = page * scale_page_stride + row
    own_key = tl.load(key + token * key_stride + source, mask=mask, other=0.0)
    own_value = tl.load(value + token * value_stride + source, mask=mask, other=0.0)
    key_entry, key_scale = _entries(own_key, MOST)
    value_entry, value_scale = _entries(own_value, MOST)
    key_at, value_at = page * key_page_stride + at, page * value_page_stride + at
    _put(key_pages, key_scales, key_entry, key_scale, key_at, scale_at, is_head, in_head, MOST)
    _put(
        value_pages,
        value_scales,
        value_entry,
        value_scale,
        value_at,
        scale_at,
        is_head,
        in_head,
        MOST,
    )


def store_kv_launch(
    key: torch.Tensor, value: torch.Tensor, pages: KVPages, slot_mapping: torch.Tensor
) -> Launch:
    """Fill the pages' slots with `key, value [T, HKV, D]`."""
    num_tokens, num_kv_heads, _ = key.shape
    return Launch(
        store_kv_kernel,
        (num_tokens, triton.cdiv(num_kv_heads, _BLOCK_H)),
        {
            "key": key,
            "value": value,
            **_page_arguments(pages),
            "slot_mapping": slot_mapping,
            "key_stride": key.stride(0),
            "value_stride": value.stride(0),
        },
        Schedule(num_warps=2, num_stages=1),
    )


def _page_arguments(pages: KVPages) -> dict[str, object]:
    _, num_kv_heads, page_size, head_dim = pages.keys.shape
    return {
        "key_pages": pages.keys,
        "value_pages": pages.values,
        "key_scales": pages.key_scales,
        "value_scales": pages.value_scales,
        "key_page_stride": pages.keys.stride(0),
        "value_page_stride": pages.values.stride(0),
        "scale_page_stride": 0 if pages.key_scales is None else pages.key_scales.stride(0),
        "KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "PAGE_SIZE": page_size,
        "MOST": QUANTISED.get(pages.keys.dtype, 0.0),
        "BLOCK_H": _BLOCK_H,
    }


@triton.jit
def rope_store_kernel(
    query_out,
    qkv,
    positions,
    cos_sin,
    key_pages,
    value_pages,
    key_scales,
    value_scales,
    slot_mapping,
    q_norm,
    k_norm,
    qkv_stride,
    key_page_stride,
    value_page_stride,
    scale_page_stride,
    norm_eps,
    norm_weight_offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program (token, BLOCK_H of its query, key and value heads).

    MOST is the largest number of quantised pages' dtype, 0 where pages are not quantised.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    is_query = head < HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    in_head = column < HEAD_DIM
    mask = (head < HEADS + 2 * KV_HEADS)[:, None] & in_head[None, :]

    # The column that turns with each: the halves swap, the rest stays.
    is_first = column < ROTARY_HALF
    is_turned = column < 2 * ROTARY_HALF
    partner = tl.where(is_first, column + ROTARY_HALF, column - ROTARY_HALF)
    partner = tl.where(is_turned, partner, column)
    source = qkv + token * qkv_stride + head[:, None] * HEAD_DIM
    own = tl.load(source + column[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=mask, other=0.0).to(tl.float32)

    if HAS_Q_NORM or HAS_K_NORM:
        scale = tl.rsqrt(tl.sum(own * own, 1) / HEAD_DIM + norm_eps)[:, None]
        if HAS_Q_NORM:
            normed = is_query[:, None]
            weight = tl.load(q_norm + column, mask=in_head, other=0.0).to(tl.float32)
            partner_weight = tl.load(q_norm + partner, mask=in_head, other=0.0).to(tl.float32)
            own = tl.where(normed, own * scale * (norm_weight_offset + weight)[None, :], own)
            other = tl.where(
                normed, other * scale * (norm_weight_offset + partner_weight)[None, :], other
            )
        if HAS_K_NORM:
            normed = is_key[:, None]
            weight = tl.load(k_norm + column, mask=in_head, other=0.0).to(tl.float32)
            partner_weight = tl.load(k_norm + partner, mask=in_head, other=0.0).to(tl.float32)
            own = tl.where(normed, own * scale * (norm_weight_offset + weight)[None, :], own)
            other = tl.where(
                normed, other * scale * (norm_weight_offset + partner_weight)[None, :], other
            )

    angle = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * ROTARY_HALF)
    frequency = tl.where(is_first, column, column - ROTARY_HALF)
    cos = tl.load(angle + frequency, mask=is_turned, other=1.0)
    sin = tl.load(angle + ROTARY_HALF + frequency, mask=is_turned, other=0.0)
    sin = tl.where(is_first, -sin, sin)
    turned = own * cos[None, :] + other * sin[None, :]
    result = tl.where(is_turned[None, :] & (head < HEADS + KV_HEADS)[:, None], turned, own)

    query_at = (token * HEADS + head)[:, None] * HEAD_DIM + column[None, :]
    query = result.to(query_out.dtype.element_ty)
    tl.store(query_out + query_at, query, mask=is_query[:, None] & in_head[None, :])
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        page = slot // PAGE_SIZE
        in_page = slot % PAGE_SIZE
        scale_at = page * scale_page_stride + (head - HEADS) * PAGE_SIZE + in_page
        key_at = ((head - HEADS) * PAGE_SIZE + in_page)[:, None] * HEAD_DIM + column[None, :]
        value_at = key_at - KV_HEADS * PAGE_SIZE * HEAD_DIM
        key_at += page * key_page_stride
        value_at += page * value_page_stride
        entry, step = _entries(result, MOST)
        _put(key_pages, key_scales, entry, step, key_at, scale_at, is_key, in_head, MOST)
        scale_at -= KV_HEADS * PAGE_SIZE
        _put(value_pages, value_scales, entry, step, value_at, scale_at, is_value, in_head, MOST)


def rope_store_launch(
    query_out: torch.Tensor,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    pages: KVPages,
    slot_mapping: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    norm_weight_offset: float,
) -> Launch:
    """Fill `query_out [T, HQ, D]` and the pages' slots."""
    num_tokens, num_heads, _ = query_out.shape
    num_kv_heads = pages.keys.shape[1]
    return Launch(
        rope_store_kernel,
        (num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, _BLOCK_H)),
        {
            "query_out": query_out,
            "qkv": qkv,
            "positions": positions,
            "cos_sin": cos_sin,
            **_page_arguments(pages),
            "slot_mapping": slot_mapping,
            "q_norm": q_norm,
            "k_norm": k_norm,
            "qkv_stride": qkv.stride(0),
            "norm_eps": norm_eps,
            "norm_weight_offset": norm_weight_offset,
            "HEADS": num_heads,
            "ROTARY_HALF": cos_sin.shape[1] // 2,
            "HAS_Q_NORM": q_norm is not None,
            "HAS_K_NORM": k_norm is not None,
        },
        Schedule(num_warps=4, num_stages=1),
    )
