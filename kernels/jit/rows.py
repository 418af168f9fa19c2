"""What works on single rows: norms, gated activations, log-softmax.

One row per program (activations: one stretch of a row), blocks fixed by the row's width: a row's
bits know nothing of the others. Arithmetic in float32, rounded once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: N803

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from kernels.jit.launch import Launch, Schedule

_ACTIVATION_BLOCK = 2048
_SOFTMAX_BLOCK = 4096


@triton.jit
def rms_norm_kernel(
    out,
    x,
    residual,
    weight,
    x_stride,
    residual_stride,
    width,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`residual += x` (optional, rounded), then the row over its root mean square, weighted."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_at = residual + row * residual_stride + column
        value += tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual_at, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    factor = weight_offset + tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    result = value * scale * factor
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gated_kernel(out, gate_up, stride, width, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    """`activation(gate) * up` of one stretch of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=mask, other=0.0).to(tl.float32)
    # 0.5 * (1 + tanh(y)) = sigmoid(2 y)
    cubic = 2.0 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    inner = gate if IS_SILU else cubic
    # The exponential of a number below 0 can't overflow.
    fall = tl.exp(-tl.abs(inner))
    sigmoid = tl.where(inner < 0, fall, 1.0) / (1.0 + fall)
    result = gate * sigmoid * up
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def log_softmax_kernel(out, logits, stride, width, BLOCK: tl.constexpr):
    """One row in three passes: the largest, the sum of exponentials, the result."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in tl.range(0, width, BLOCK):
        mask = start + lane < width
        value = tl.load(logits + row * stride + start + lane, mask=mask, other=float("-inf"))
        largest = tl.maximum(largest, value)
    highest = tl.max(largest, 0)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(0, width, BLOCK):
        mask = start + lane < width
        value = tl.load(logits + row * stride + start + lane, mask=mask, other=float("-inf"))
        sums += tl.exp(value - highest)
    shift = tl.log(tl.sum(sums, 0))
    for start in tl.range(0, width, BLOCK):
        mask = start + lane < width
        value = tl.load(logits + row * stride + start + lane, mask=mask, other=0.0)
        tl.store(out + row * width + start + lane, (value - highest) - shift, mask=mask)


def rms_norm_launch(
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
) -> Launch:
    """Fill `out [T, H]`; `residual [T, H]` is changed in place where given."""
    num_rows, width = x.shape
    block = triton.next_power_of_2(width)
    return Launch(
        rms_norm_kernel,
        (num_rows,),
        {
            "out": out,
            "x": x,
            "residual": residual,
            "weight": weight,
            "x_stride": x.stride(0),
            "residual_stride": 0 if residual is None else residual.stride(0),
            "width": width,
            "eps": eps,
            "weight_offset": weight_offset,
            "HAS_RESIDUAL": residual is not None,
            "BLOCK": block,
        },
        Schedule(num_warps=max(1, min(16, block // 512)), num_stages=1),
    )


def gated_launch(
    out: torch.Tensor, gate_up: torch.Tensor, activation: Literal["silu", "gelu"]
) -> Launch:
    """Fill `out [T, I]` from `gate_up [T, 2 I]`."""
    num_rows, width = out.shape
    return Launch(
        gated_kernel,
        (num_rows, triton.cdiv(width, _ACTIVATION_BLOCK)),
        {
            "out": out,
            "gate_up": gate_up,
            "stride": gate_up.stride(0),
            "width": width,
            "IS_SILU": activation == "silu",
            "BLOCK": _ACTIVATION_BLOCK,
        },
        Schedule(num_warps=4, num_stages=1),
    )


def log_softmax_launch(out: torch.Tensor, logits: torch.Tensor) -> Launch:
    """Fill `out [R, V]` float32."""
    num_rows, width = logits.shape
    return Launch(
        log_softmax_kernel,
        (num_rows,),
        {
            "out": out,
            "logits": logits,
            "stride": logits.stride(0),
            "width": width,
            "BLOCK": min(_SOFTMAX_BLOCK, triton.next_power_of_2(width)),
        },
        Schedule(num_warps=8, num_stages=1),
    )
