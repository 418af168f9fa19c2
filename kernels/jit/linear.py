"""Matrix products whose rows don't depend on how many there are.

Each element of the result is one chain of matrix instructions over ascending K, in float32: no
split of K, one BLOCK_K for every number of rows. Only the tile's height and width follow the number
of rows. With `grouped_linear_kernel` each tile takes the weight of its rows' expert.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: N803

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from kernels.jit.launch import Launch, Schedule, Target

BLOCK_K = 64
"""Columns of a step; half of it in float32, which has no matrix instructions at full precision."""

_GROUP_M = 8
"""Tiles of rows that run beside each other, so that they share the weight's tiles in the cache."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of one product's tiles."""

    block_m: int
    block_n: int
    block_k: int
    schedule: Schedule


def choose_tiles(
    target: Target, num_rows: int, out_features: int, dtype: torch.dtype, *, exact: bool
) -> Tiles:
    """Tiles for a product of `num_rows` rows: narrow where the weight's bandwidth is the limit.

    With `exact`, all of them use the same kind of matrix instruction.
    """
    if dtype == torch.float32:
        return Tiles(16, 64, BLOCK_K // 2, Schedule(num_warps=4, num_stages=1))
    is_small = target.shared_bytes < (160 << 10)
    least_rows = 64 if exact and target.has_large_tile_instructions else 16
    if num_rows <= 64:
        block_m = max(least_rows, 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64)
        block_n = 32 if out_features <= 8192 else 64
        return Tiles(block_m, block_n, BLOCK_K, _fitting(target, block_m, block_n, 4, 6))
    if num_rows <= 256 or is_small:
        num_warps = 4 if target.has_large_tile_instructions or target.backend == "hip" else 8
        return Tiles(64, 128, BLOCK_K, _fitting(target, 64, 128, num_warps, 4))
    block_n = 256 if target.has_large_tile_instructions else 128
    return Tiles(128, block_n, BLOCK_K, _fitting(target, 128, block_n, 8, 3))


def _fitting(target: Target, block_m: int, block_n: int, num_warps: int, stages: int) -> Schedule:
    step_bytes = 2 * BLOCK_K * (block_m + block_n)
    return Schedule(num_warps, max(1, min(stages, target.shared_bytes // step_bytes)))


@triton.jit
def _product(
    x_row,
    weight_row,
    row_mask,
    column_mask,
    in_features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One tile's sums over K. `x_row [M]` and `weight_row [N]` point at the rows' first entries."""
    along = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, in_features, BLOCK_K):
        x_at = x_row[:, None] + (start + along)[None, :]
        weight_at = weight_row[None, :] + (start + along)[:, None]
        if EVEN_K:
            x = tl.load(x_at, mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_at, mask=column_mask[None, :], other=0.0)
        else:
            rest = start + along < in_features
            x = tl.load(x_at, mask=row_mask[:, None] & rest[None, :], other=0.0)
            weight = tl.load(weight_at, mask=column_mask[None, :] & rest[:, None], other=0.0)
        # Bytes fit into every float without rounding; their scale comes after the sum.
        acc = tl.dot(x, weight.to(x.dtype), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    out,
    x,
    weight,
    bias,
    scales,
    num_rows,
    out_features,
    in_features,
    x_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """`out [M, N] = x [M, K] @ weight [N, K].T * scales [N] + bias [N]`, one tile per program."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    per_group = GROUP_M * tiles_n
    first_m = program // per_group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    row = (first_m + program % per_group % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = program % per_group // group_m * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < num_rows
    column_mask = column < out_features
    acc = _product(
        x + row.to(tl.int64) * x_stride,
        weight + column.to(tl.int64) * in_features,
        row_mask,
        column_mask,
        in_features,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
    )
    if HAS_SCALES:
        acc *= tl.load(scales + column, mask=column_mask, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    out_at = out + (row.to(tl.int64) * out_features)[:, None] + column[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def grouped_linear_kernel(
    out,
    x,
    weights,
    biases,
    scales,
    row_order,
    expert_starts,
    num_rows,
    out_features,
    in_features,
    x_stride,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Program (tile of columns, tile of one expert's rows): those rows times that weight.

    weights, biases, scales: addresses of the experts' tensors, int64 [NUM_EXPERTS]
    row_order:       rows sorted by expert, int64 [num_rows]
    expert_starts:   where each expert's rows begin in it, int64 [NUM_EXPERTS + 1]
    """
    tile = tl.program_id(1)
    expert = tl.arange(0, BLOCK_E)
    is_expert = expert < NUM_EXPERTS
    starts = tl.load(expert_starts + expert, mask=is_expert, other=0).to(tl.int32)
    ends = tl.load(expert_starts + expert + 1, mask=is_expert, other=0).to(tl.int32)
    tiles = tl.cdiv(ends - starts, BLOCK_M)
    tiles_until = tl.cumsum(tiles, 0)
    if tile >= tl.sum(tiles, 0):
        return
    own = tl.sum((tiles_until <= tile).to(tl.int32), 0)
    is_own = expert == own
    first = tl.sum(tl.where(is_own, starts, 0), 0)
    end = tl.sum(tl.where(is_own, ends, 0), 0)
    first += (tile - tl.sum(tl.where(is_own, tiles_until - tiles, 0), 0)) * BLOCK_M

    place = first + tl.arange(0, BLOCK_M)
    row_mask = place < end
    row = tl.load(row_order + place, mask=row_mask, other=0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < out_features
    address = tl.load(weights + own)
    if HAS_SCALES:
        weight = address.to(tl.pointer_type(tl.int8))
    else:
        weight = address.to(tl.pointer_type(x.dtype.element_ty))
    weight = tl.multiple_of(weight, 16)
    acc = _product(
        x + row * x_stride,
        weight + column.to(tl.int64) * in_features,
        row_mask,
        column_mask,
        in_features,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
    )
    if HAS_SCALES:
        scale = tl.load(scales + own).to(tl.pointer_type(tl.float32))
        acc *= tl.load(scale + column, mask=column_mask, other=0.0)[None, :]
    if HAS_BIAS:
        bias = tl.load(biases + own).to(tl.pointer_type(x.dtype.element_ty))
        acc += tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    out_at = out + (row * out_features)[:, None] + column[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def linear_launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    tiles: Tiles,
) -> Launch:
    """Fill `out [M, N]`, contiguous; `x` may have strided rows, `weight [N, K]` is contiguous."""
    num_rows, out_features = out.shape
    in_features = weight.shape[1]
    grid = triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(out_features, tiles.block_n)
    return Launch(
        linear_kernel,
        (grid,),
        {
            "out": out,
            "x": x,
            "weight": weight,
            "bias": bias,
            "scales": scales,
            "num_rows": num_rows,
            "out_features": out_features,
            "in_features": in_features,
            "x_stride": x.stride(0),
            "HAS_BIAS": bias is not None,
            "HAS_SCALES": scales is not None,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "GROUP_M": _GROUP_M,
            "EVEN_K": in_features % tiles.block_k == 0,
        },
        tiles.schedule,
    )


def grouped_linear_launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    biases: torch.Tensor | None,
    scales: torch.Tensor | None,
    row_order: torch.Tensor,
    expert_starts: torch.Tensor,
    tiles: Tiles,
) -> Launch:
    """Fill `out [R, N]`; the rest as `grouped_linear_kernel` says."""
    num_rows, out_features = out.shape
    num_experts, in_features = weights.shape[0], x.shape[1]
    # Each expert with rows fills at most one tile only in part.
    row_tiles = num_rows // tiles.block_m + min(num_experts, num_rows)
    return Launch(
        grouped_linear_kernel,
        (triton.cdiv(out_features, tiles.block_n), row_tiles),
        {
            "out": out,
            "x": x,
            "weights": weights,
            "biases": biases,
            "scales": scales,
            "row_order": row_order,
            "expert_starts": expert_starts,
            "num_rows": num_rows,
            "out_features": out_features,
            "in_features": in_features,
            "x_stride": x.stride(0),
            "NUM_EXPERTS": num_experts,
            "BLOCK_E": triton.next_power_of_2(num_experts),
            "HAS_BIAS": biases is not None,
            "HAS_SCALES": scales is not None,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "EVEN_K": in_features % tiles.block_k == 0,
        },
        tiles.schedule,
    )
