"""Paged attention: decode with the keys split over programs, extend with the queries tiled.

Both kernels walk the keys of a row in tiles at absolute positions, restart their sums at absolute
multiples of `SPLIT` keys, and merge the splits in order with the same formulas. So a row's bits
depend on neither which kernel computed it, nor its batch mates, nor how its prompt was cut.

Two exact facts carry the design: a tile that a row can't see changes nothing of that row (its
weights are 0 and its rescaling is 1), and neither does merging an empty split.

Knows pages as tensors; nothing about who owns them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: N803, N806

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl

from kernels.jit.launch import Launch, Schedule, Target
from kernels.ops import KVPages
from kernels.splits import FEW_QUERIES, SPLIT

_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of one attention kernel's tiles."""

    block_m: int
    """Rows: queries times the heads of a group."""
    tile: int
    """Keys of a step."""
    schedule: Schedule


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionTiles:
    """The two kernels' tiles for one head size."""

    decode: Tiles
    extend: Tiles


def choose_tiles(
    target: Target,
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    *,
    exact: bool,
    quantised: bool = False,
) -> AttentionTiles:
    """Tiles that spill no registers (docs/kernels-gpu.md has what the compiler made of each).

    `quantised` pages take registers to convert their entries in, so no larger tiles then.
    With `exact` both kernels take the same step, and lay a row out over threads in the same way, so
    that its sums add up in the same order.
    """
    width = _padded(head_dim)
    least_rows = triton.next_power_of_2(group)

    def tiles(block_m: int, tile: int, num_warps: int, num_stages: int) -> Tiles:
        if block_m < least_rows:  # a large group: as many rows a warp as before
            num_warps = min(8, num_warps * least_rows // block_m)
            block_m = least_rows
        step_bytes = 2 * 2 * tile * width  # keys and values of one step
        spare = target.shared_bytes - 2 * block_m * max(width, 64)
        fitting = num_stages if target.backend == "hip" else spare // step_bytes
        return Tiles(block_m, tile, Schedule(num_warps, max(1, min(num_stages, fitting))))

    if dtype == torch.float32:  # no matrix instructions at full precision
        both = Tiles(max(16, least_rows), 32 if width <= 128 else 16, Schedule(4, 1))
        return AttentionTiles(both, both)
    if exact or quantised:
        if width > 128:
            tile = 16 if quantised and (target.backend == "hip" or not exact) else 32
            # What Triton 3.6 and 3.9 both make without spills on the card measured first.
            stages = 3 if target.arch == "sm_90" and not exact else 2
            return AttentionTiles(tiles(32, tile, 8, 3), tiles(32, tile, 8, stages))
        if target.arch == "sm_90":  # one warp group for 64 rows, two for 128
            tile = 64 if width <= 64 else 32
            if quantised:  # two warp groups for 64 rows: each has half of the columns
                return AttentionTiles(tiles(64, tile, 8, 3), tiles(64, tile, 8, 2))
            return AttentionTiles(tiles(64, tile, 4, 3), tiles(128, tile, 8, 2))
        if quantised and target.has_large_tile_instructions:
            return AttentionTiles(tiles(64, 32, 8, 2), tiles(64, 32, 8, 1))
        num_warps = 4 if target.backend == "hip" else 8
        stages = 2 if target.backend == "hip" else 3
        return AttentionTiles(tiles(64, 32, num_warps, stages), tiles(64, 32, num_warps, 2))
    if width > 128 or target.shared_bytes < (160 << 10):
        return AttentionTiles(tiles(16, 32, 4, 3), tiles(64, 32, 8, 2))
    if target.arch == "sm_90":
        return AttentionTiles(tiles(16, 64, 4, 3), tiles(128, 64, 8, 2))
    extend = tiles(64, 64, 8, 2) if width <= 64 else tiles(128, 32, 8, 2)
    return AttentionTiles(tiles(16, 64, 4, 3), extend)


# --- what both kernels share ----------------------------------------------------------------------


@triton.jit
def _attend(
    acc,
    maximum,
    total,
    query,
    query_position,
    key_head,
    value_head,
    key_scale_head,
    value_scale_head,
    page_table,
    key_page_stride,
    value_page_stride,
    scale_page_stride,
    begin,
    end,
    visible_begin,
    visible_end,
    scale_log2,
    soft_cap,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    QUANTISED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """Online softmax (Milakov and Gimelshein 2018) of keys begin .. end, in base 2.

    `begin` is a multiple of TILE. Unless MASKED, every row sees every key of the range.
    Slots outside visible_begin .. visible_end are never read, so what they hold can't show.
    Entries of QUANTISED pages are exact in every dtype that queries have; scales of keys go to the
    scores, and those of values to the weights, after these were summed.
    """
    step = tl.arange(0, TILE)
    column = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, TILE):
        position = start + step
        inside = (position >= visible_begin) & (position < visible_end)
        if MASKED:
            page = tl.load(page_table + position // PAGE_SIZE, mask=inside, other=0)
        else:
            page = tl.load(page_table + position // PAGE_SIZE)
        page = page.to(tl.int64)
        in_page = (position % PAGE_SIZE) * HEAD_DIM
        key_at = key_head + (page * key_page_stride + in_page)[None, :] + column[:, None]
        value_at = value_head + (page * value_page_stride + in_page)[:, None] + column[None, :]
        if MASKED and BLOCK_D != HEAD_DIM:
            mask = inside[None, :] & (column < HEAD_DIM)[:, None]
            key = tl.load(key_at, mask=mask, other=0.0)
        elif MASKED:
            key = tl.load(key_at, mask=inside[None, :], other=0.0)
        elif BLOCK_D != HEAD_DIM:
            key = tl.load(key_at, mask=(column < HEAD_DIM)[:, None], other=0.0)
        else:
            key = tl.load(key_at)

        score = tl.dot(query, key.to(query.dtype), input_precision="ieee") * scale_log2
        if QUANTISED:
            scale_at = page * scale_page_stride + position % PAGE_SIZE
            if MASKED:
                key_scale = tl.load(key_scale_head + scale_at, mask=inside, other=0.0)
                value_scale = tl.load(value_scale_head + scale_at, mask=inside, other=0.0)
            else:
                key_scale = tl.load(key_scale_head + scale_at)
                value_scale = tl.load(value_scale_head + scale_at)
            score = score * key_scale[None, :]
        if HAS_SOFT_CAP:
            # soft_cap is given in base 2 as well. tanh by the exponential that can't overflow.
            fall = tl.exp2(tl.abs(score) * (-2.0 * 1.4426950408889634 / soft_cap))
            capped = soft_cap * ((1.0 - fall) / (1.0 + fall))
            score = tl.where(score < 0, -capped, capped)
        if MASKED:
            seen = inside[None, :] & (position[None, :] <= query_position[:, None])
            if HAS_WINDOW:
                seen = seen & (position[None, :] > query_position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))

        highest = tl.maximum(maximum, tl.max(score, 1))
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        anchor = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(score - anchor[:, None])
        shrink = tl.exp2(maximum - anchor)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        maximum = highest

        # Values are masked too: 0 * NaN is NaN.
        if MASKED and BLOCK_D != HEAD_DIM:
            mask = inside[:, None] & (column < HEAD_DIM)[None, :]
            value = tl.load(value_at, mask=mask, other=0.0)
        elif MASKED:
            value = tl.load(value_at, mask=inside[:, None], other=0.0)
        elif BLOCK_D != HEAD_DIM:
            value = tl.load(value_at, mask=(column < HEAD_DIM)[None, :], other=0.0)
        else:
            value = tl.load(value_at)
        if QUANTISED:
            # Weights by scales may be smaller than a float16 can be; a bfloat16 can.
            weight = weight * value_scale[None, :]
            kind = tl.float32 if query.dtype == tl.float32 else tl.bfloat16
            value = value.to(kind)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision="ieee")
    return acc, maximum, total


@triton.jit
def _merge(acc, maximum, total, other_acc, other_maximum, other_total):
    """Both parts' sums under one maximum. An empty part (maximum -inf) changes nothing."""
    highest = tl.maximum(maximum, other_maximum)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    shrink = tl.exp2(maximum - anchor)
    other_shrink = tl.exp2(other_maximum - anchor)
    acc = acc * shrink[:, None] + other_acc * other_shrink[:, None]
    return acc, highest, total * shrink + other_total * other_shrink


@triton.jit
def _normalise(acc, maximum, total, sink_log2, HAS_SINKS: tl.constexpr):
    """The weighted mean, and the logarithm of the weights' sum.

    A sink takes weight and gives no value, once for a row.
    """
    if HAS_SINKS:
        highest = tl.maximum(maximum, sink_log2)
        shrink = tl.exp2(maximum - highest)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.exp2(sink_log2 - highest)
        maximum = highest
    # A row that sees nothing (padding) would divide by 0.
    total = tl.where(total == 0.0, 1.0, total)
    return acc / total[:, None], (maximum + tl.log2(total)) * 0.6931471805599453


@triton.jit
def _first_visible(position, window, HAS_WINDOW: tl.constexpr):
    """The first key that a query at `position` sees."""
    if HAS_WINDOW:
        return tl.maximum(position - window + 1, 0)
    else:
        return position * 0


@triton.jit
def _scale_heads(
    key_scales, value_scales, kv_head, PAGE_SIZE: tl.constexpr, QUANTISED: tl.constexpr
):
    """Where a head's scales begin; anything unless QUANTISED."""
    if QUANTISED:
        return key_scales + kv_head * PAGE_SIZE, value_scales + kv_head * PAGE_SIZE
    else:
        return kv_head, kv_head


# --- decode ---------------------------------------------------------------------------------------


@triton.jit
def _find_sequence(query_starts, num_seqs, place, BLOCK_Q: tl.constexpr):
    """The sequence whose block of BLOCK_Q queries is number `place`.

    Block i of sequence s is number query_starts[s] // BLOCK_Q + s + i, without the s where
    BLOCK_Q is 1: then blocks are queries.
    """
    low = place * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        start = tl.load(query_starts + middle) // BLOCK_Q
        if BLOCK_Q > 1:
            start += middle
        low = tl.where(start <= place, middle, low)
        high = tl.where(start <= place, high, middle)
    return low


@triton.jit
def _find_query(query_starts, num_seqs, place, BY_QUERY: tl.constexpr):
    """(sequence, query) of a decode program; query -1 where there is nothing to do."""
    if BY_QUERY:
        # Nearly always each sequence has one query, and nothing must be searched.
        query = place
        sequence = tl.minimum(place, num_seqs - 1)
        if (tl.load(query_starts + sequence) != place) | (
            tl.load(query_starts + sequence + 1) != place + 1
        ):
            sequence = _find_sequence(query_starts, num_seqs, place, 1)
        if place >= tl.load(query_starts + num_seqs):  # padding
            query = place * 0 - 1
    else:
        sequence = place
        query = tl.load(query_starts + sequence)
        if tl.load(query_starts + sequence + 1) != query + 1:
            query = place * 0 - 1
    return sequence, query


@triton.jit(do_not_specialize=["num_seqs", "window", "max_splits", "page_table_stride"])
def decode_kernel(
    out,
    lse,
    part_acc,
    part_state,
    query,
    key_pages,
    value_pages,
    key_scales,
    value_scales,
    page_tables,
    seq_lens,
    query_starts,
    sinks,
    query_stride,
    key_page_stride,
    value_page_stride,
    scale_page_stride,
    page_table_stride,
    num_seqs,
    max_splits,
    scale_log2,
    soft_cap,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BY_QUERY: tl.constexpr,
    QUANTISED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Program (kv head, place, split): one query's heads of a group over one split of its keys.

    A place is a query with BY_QUERY, else a sequence; then those with another number of queries
    than one are left to `extend_kernel`. Writes the result where the query sees one split only,
    else the split's sums for `combine_kernel`.
    """
    kv_head = tl.program_id(0)
    place = tl.program_id(1)
    split = tl.program_id(2)
    sequence, token = _find_query(query_starts, num_seqs, place, BY_QUERY)
    if token < 0:
        return
    end_of_queries = tl.load(query_starts + sequence + 1)
    visible_end = tl.load(seq_lens + sequence) - (end_of_queries - token - 1)
    visible_begin = _first_visible(visible_end - 1, window, HAS_WINDOW)
    begin = tl.maximum(split * SPLIT, visible_begin // TILE * TILE)
    end = tl.minimum(split * SPLIT + SPLIT, visible_end)
    if begin >= end:
        return

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + row
    is_row = row < GROUP
    mask = is_row[:, None] & (column < HEAD_DIM)[None, :]
    query_row = query + token.to(tl.int64) * query_stride
    queries = tl.load(
        query_row + (head * HEAD_DIM)[:, None] + column[None, :], mask=mask, other=0.0
    )
    key_scale_head, value_scale_head = _scale_heads(
        key_scales, value_scales, kv_head, PAGE_SIZE, QUANTISED
    )
    acc, maximum, total = _attend(
        tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32),
        tl.full([BLOCK_M], float("-inf"), dtype=tl.float32),
        tl.zeros([BLOCK_M], dtype=tl.float32),
        queries,
        tl.zeros([BLOCK_M], dtype=tl.int32) + (visible_end - 1),
        key_pages + kv_head * (PAGE_SIZE * HEAD_DIM),
        value_pages + kv_head * (PAGE_SIZE * HEAD_DIM),
        key_scale_head,
        value_scale_head,
        page_tables + sequence.to(tl.int64) * page_table_stride,
        key_page_stride,
        value_page_stride,
        scale_page_stride,
        begin,
        end,
        visible_begin,
        visible_end,
        scale_log2,
        soft_cap,
        window,
        HEAD_DIM,
        BLOCK_D,
        PAGE_SIZE,
        TILE,
        True,
        QUANTISED,
        HAS_WINDOW,
        HAS_SOFT_CAP,
    )
    if visible_begin // SPLIT == (visible_end - 1) // SPLIT:
        sink = maximum
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=is_row, other=0.0) * 1.4426950408889634
        result, row_lse = _normalise(acc, maximum, total, sink, HAS_SINKS)
        if HAS_LSE:
            tl.store(lse + token.to(tl.int64) * HEADS + head, row_lse, mask=is_row)
        out_row = out + token.to(tl.int64) * (HEADS * HEAD_DIM)
        out_at = out_row + (head * HEAD_DIM)[:, None] + column[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=mask)
    else:
        part = (place.to(tl.int64) * HEADS + head) * max_splits + split
        tl.store(part_acc + part[:, None] * HEAD_DIM + column[None, :], acc, mask=mask)
        tl.store(part_state + part * 2, maximum, mask=is_row)
        tl.store(part_state + part * 2 + 1, total, mask=is_row)


@triton.jit(do_not_specialize=["num_seqs", "window", "max_splits"])
def combine_kernel(
    out,
    lse,
    part_acc,
    part_state,
    seq_lens,
    query_starts,
    sinks,
    num_seqs,
    max_splits,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BY_QUERY: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Program (kv head, place): merge the splits of a place's query in ascending order."""
    kv_head = tl.program_id(0)
    place = tl.program_id(1)
    sequence, token = _find_query(query_starts, num_seqs, place, BY_QUERY)
    if token < 0:
        return
    end_of_queries = tl.load(query_starts + sequence + 1)
    visible_end = tl.load(seq_lens + sequence) - (end_of_queries - token - 1)
    visible_begin = _first_visible(visible_end - 1, window, HAS_WINDOW)
    first_split = visible_begin // SPLIT
    last_split = (visible_end - 1) // SPLIT
    if first_split >= last_split:
        return

    in_group = tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_D)
    is_head = in_group < GROUP
    head = kv_head * GROUP + in_group
    mask = is_head[:, None] & (column < HEAD_DIM)[None, :]
    acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    maximum = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_G], dtype=tl.float32)
    row_part = (place.to(tl.int64) * HEADS + head) * max_splits
    for split in tl.range(first_split, last_split + 1, num_stages=1, loop_unroll_factor=UNROLL):
        part = row_part + split
        other_acc = tl.load(
            part_acc + part[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0
        )
        other_maximum = tl.load(part_state + part * 2, mask=is_head, other=float("-inf"))
        other_total = tl.load(part_state + part * 2 + 1, mask=is_head, other=0.0)
        acc, maximum, total = _merge(acc, maximum, total, other_acc, other_maximum, other_total)
    sink = maximum
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=is_head, other=0.0) * 1.4426950408889634
    result, row_lse = _normalise(acc, maximum, total, sink, HAS_SINKS)
    if HAS_LSE:
        tl.store(lse + token.to(tl.int64) * HEADS + head, row_lse, mask=is_head)
    out_row = out + token.to(tl.int64) * (HEADS * HEAD_DIM)
    out_at = out_row + (head * HEAD_DIM)[:, None] + column[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=mask)


# --- extend ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_seqs", "min_queries", "window", "page_table_stride"])
def extend_kernel(
    out,
    lse,
    query,
    key_pages,
    value_pages,
    key_scales,
    value_scales,
    page_tables,
    seq_lens,
    query_starts,
    sinks,
    query_stride,
    key_page_stride,
    value_page_stride,
    scale_page_stride,
    page_table_stride,
    num_seqs,
    min_queries,
    scale_log2,
    soft_cap,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,
    QUANTISED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Program (query block, kv head): BLOCK_M // GROUP queries over all keys that they see.

    The queries of one sequence that share a key-value head are packed into the rows of a tile:
    row = query * GROUP + head within the group. Blocks are numbered as in `_find_sequence`, so the
    host needs to know only how many queries and sequences there are. Later blocks see more keys
    and start first. Sequences with fewer than min_queries queries are left to `decode_kernel`.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _find_sequence(query_starts, num_seqs, block, BLOCK_Q)
    first_query = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - first_query
    first = (block - first_query // BLOCK_Q - sequence) * BLOCK_Q
    if (num_queries < min_queries) | (first >= num_queries):
        return
    seq_len = tl.load(seq_lens + sequence)

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    query_index = first + row // GROUP
    is_row = (row < BLOCK_Q * GROUP) & (query_index < num_queries)
    query_position = tl.where(is_row, seq_len - num_queries + query_index, -1)
    head = kv_head * GROUP + row % GROUP
    token = (first_query + query_index).to(tl.int64)
    mask = is_row[:, None] & (column < HEAD_DIM)[None, :]
    query_at = (token * query_stride + head * HEAD_DIM)[:, None] + column[None, :]
    queries = tl.load(query + query_at, mask=mask, other=0.0)

    page_table = page_tables + sequence.to(tl.int64) * page_table_stride
    key_head = key_pages + kv_head * (PAGE_SIZE * HEAD_DIM)
    value_head = value_pages + kv_head * (PAGE_SIZE * HEAD_DIM)
    key_scale_head, value_scale_head = _scale_heads(
        key_scales, value_scales, kv_head, PAGE_SIZE, QUANTISED
    )
    block_first = seq_len - num_queries + first
    visible_end = tl.minimum(block_first + BLOCK_Q, seq_len)
    visible_begin = _first_visible(block_first, window, HAS_WINDOW)
    # Up to here every row of the block sees every key: no mask is needed.
    plain_end = (block_first + 1) // TILE * TILE
    if HAS_WINDOW:
        plain_end = visible_begin * 0

    all_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    all_maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    all_total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Without EXACT one stretch for all keys.
    stretch = SPLIT if EXACT else visible_end + TILE
    for split_begin in tl.range(
        visible_begin // stretch * stretch, visible_end, stretch, num_stages=1
    ):
        begin = tl.maximum(split_begin, visible_begin // TILE * TILE)
        end = tl.minimum(split_begin + stretch, visible_end)
        plain = tl.maximum(tl.minimum(end, plain_end), begin)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        if not HAS_WINDOW:
            acc, maximum, total = _attend(
                acc,
                maximum,
                total,
                queries,
                query_position,
                key_head,
                value_head,
                key_scale_head,
                value_scale_head,
                page_table,
                key_page_stride,
                value_page_stride,
                scale_page_stride,
                begin,
                plain,
                visible_begin,
                visible_end,
                scale_log2,
                soft_cap,
                window,
                HEAD_DIM,
                BLOCK_D,
                PAGE_SIZE,
                TILE,
                False,
                QUANTISED,
                HAS_WINDOW,
                HAS_SOFT_CAP,
            )
        acc, maximum, total = _attend(
            acc,
            maximum,
            total,
            queries,
            query_position,
            key_head,
            value_head,
            key_scale_head,
            value_scale_head,
            page_table,
            key_page_stride,
            value_page_stride,
            scale_page_stride,
            plain,
            end,
            visible_begin,
            visible_end,
            scale_log2,
            soft_cap,
            window,
            HEAD_DIM,
            BLOCK_D,
            PAGE_SIZE,
            TILE,
            True,
            QUANTISED,
            HAS_WINDOW,
            HAS_SOFT_CAP,
        )
        if EXACT:
            all_acc, all_maximum, all_total = _merge(
                all_acc, all_maximum, all_total, acc, maximum, total
            )
        else:
            all_acc, all_maximum, all_total = acc, maximum, total

    sink = tl.load(sinks + head) * 1.4426950408889634 if HAS_SINKS else all_maximum
    result, row_lse = _normalise(all_acc, all_maximum, all_total, sink, HAS_SINKS)
    if HAS_LSE:
        tl.store(lse + token * HEADS + head, row_lse, mask=is_row)
    out_at = ((token * HEADS + head) * HEAD_DIM)[:, None] + column[None, :]
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=mask)


# --- merging parts --------------------------------------------------------------------------------


@triton.jit
def merge_states_kernel(
    out,
    lse,
    out_a,
    lse_a,
    out_b,
    lse_b,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program (BLOCK_R rows: heads of queries)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    is_row = row < num_rows
    in_row = is_row[:, None] & (column < HEAD_DIM)[None, :]
    weight_a = tl.load(lse_a + row, mask=is_row, other=0.0)
    weight_b = tl.load(lse_b + row, mask=is_row, other=0.0)
    has_a, has_b = weight_a != float("-inf"), weight_b != float("-inf")
    at = row[:, None] * HEAD_DIM + column[None, :]
    a = tl.load(out_a + at, mask=in_row & has_a[:, None], other=0.0).to(tl.float32)
    b = tl.load(out_b + at, mask=in_row & has_b[:, None], other=0.0).to(tl.float32)

    highest = tl.maximum(weight_a, weight_b)
    anchor = tl.where(has_a | has_b, highest, 0.0)
    share_a = tl.exp2((weight_a - anchor) * 1.4426950408889634)
    share_b = tl.exp2((weight_b - anchor) * 1.4426950408889634)
    total = share_a + share_b
    divisor = tl.where(total == 0.0, 1.0, total)
    result = a * (share_a / divisor)[:, None] + b * (share_b / divisor)[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=in_row)
    # One part alone keeps its bits.
    merged = tl.where(has_a & has_b, anchor + tl.log2(divisor) * 0.6931471805599453, highest)
    tl.store(lse + row, merged, mask=is_row)


def merge_states_launch(
    out: torch.Tensor,
    lse: torch.Tensor,
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
) -> Launch:
    """Fill `out [T, HQ, D]` and `lse [T, HQ]`."""
    head_dim, num_rows = out.shape[2], lse.numel()
    block_d = triton.next_power_of_2(head_dim)
    block_r = max(1, 2048 // block_d)
    return Launch(
        merge_states_kernel,
        (triton.cdiv(num_rows, block_r),),
        {
            "out": out,
            "lse": lse,
            "out_a": out_a,
            "lse_a": lse_a,
            "out_b": out_b,
            "lse_b": lse_b,
            "num_rows": num_rows,
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_d,
            "BLOCK_R": block_r,
        },
        Schedule(num_warps=4, num_stages=1),
    )


# --- launches -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """One call of `Ops.paged_attention`, with the memory that it may use."""

    query: torch.Tensor
    pages: KVPages
    page_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_starts: torch.Tensor
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: torch.Tensor | None
    tiles: AttentionTiles
    exact: bool

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.query.shape[1] // self.pages.keys.shape[1]

    @property
    def max_splits(self) -> int:
        """Splits of the longest sequence that the page tables can hold."""
        return max(1, -(-self.page_tables.shape[1] * self.pages.keys.shape[2] // SPLIT))

    @property
    def is_decode(self) -> bool:
        """Few queries: the decode kernel takes all of them, however they are shared out."""
        return self.query.shape[0] <= max(self.page_tables.shape[0], FEW_QUERIES)

    @property
    def part_rows(self) -> int:
        """Queries whose keys may lie in several splits."""
        if self.max_splits == 1:
            return 0
        return self.query.shape[0] if self.is_decode else self.page_tables.shape[0]

    def launches(
        self,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        part_acc: torch.Tensor,
        part_state: torch.Tensor,
    ) -> list[Launch]:
        """What fills `out [T, HQ, D]` and `lse [T, HQ]`, where there is one, in order.

        part_acc:   float32 [part_rows, HQ, max_splits, D], any contents
        part_state: float32 [part_rows, HQ, max_splits, 2]: maximum and total of a split
        """
        num_tokens, num_seqs = self.query.shape[0], self.page_tables.shape[0]
        if num_tokens == 0 or num_seqs == 0:
            return []
        if self.is_decode:
            return self._decode(out, lse, part_acc, part_state, num_tokens)
        if num_seqs == 1:
            return [self._extend(out, lse, min_queries=1)]
        return [
            self._extend(out, lse, min_queries=2),
            *self._decode(out, lse, part_acc, part_state, num_seqs),
        ]

    def _decode(
        self,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        part_acc: torch.Tensor,
        part_state: torch.Tensor,
        places: int,
    ) -> list[Launch]:
        tiles, grid = self.tiles.decode, (self.pages.keys.shape[1], places)
        parts = {
            "part_acc": part_acc,
            "part_state": part_state,
            "max_splits": self.max_splits,
            "BY_QUERY": self.is_decode,
        }
        decode = Launch(
            decode_kernel,
            (*grid, self.max_splits),
            {**self._common(out, lse), **self._keys(), **parts, **_tile_arguments(tiles)},
            tiles.schedule,
        )
        if self.max_splits == 1:
            return [decode]
        block_g = triton.next_power_of_2(self.group)
        block_d = _padded(self.query.shape[2])
        combine = Launch(
            combine_kernel,
            grid,
            {
                **self._common(out, lse),
                **parts,
                "BLOCK_G": block_g,
                "UNROLL": 4 if block_g <= 8 else 1,
            },
            # Four numbers a thread: 16 bytes a load. Columns that pad count, so that warps are a
            # power of two.
            Schedule(num_warps=max(1, min(4, block_g * block_d // 128)), num_stages=1),
        )
        return [decode, combine]

    def _extend(self, out: torch.Tensor, lse: torch.Tensor | None, min_queries: int) -> Launch:
        tiles, num_seqs = self.tiles.extend, self.page_tables.shape[0]
        # Each sequence fills at most one block only in part.
        num_blocks = self.query.shape[0] // (tiles.block_m // self.group) + num_seqs
        return Launch(
            extend_kernel,
            (num_blocks, self.pages.keys.shape[1]),
            {
                **self._common(out, lse),
                **self._keys(),
                **_tile_arguments(tiles),
                "min_queries": min_queries,
                "EXACT": self.exact,
            },
            tiles.schedule,
        )

    def _common(self, out: torch.Tensor, lse: torch.Tensor | None) -> dict[str, object]:
        head_dim = self.query.shape[2]
        return {
            "out": out,
            "lse": lse,
            "seq_lens": self.seq_lens,
            "query_starts": self.query_starts,
            "sinks": self.sinks,
            "num_seqs": self.page_tables.shape[0],
            "window": self.window or 0,
            "HEADS": self.query.shape[1],
            "GROUP": self.group,
            "HEAD_DIM": head_dim,
            "BLOCK_D": _padded(head_dim),
            "SPLIT": SPLIT,
            "HAS_WINDOW": self.window is not None,
            "HAS_SINKS": self.sinks is not None,
            "HAS_LSE": lse is not None,
        }

    def _keys(self) -> dict[str, object]:
        scales = self.pages.key_scales
        return {
            "query": self.query,
            "key_pages": self.pages.keys,
            "value_pages": self.pages.values,
            "key_scales": scales,
            "value_scales": self.pages.value_scales,
            "page_tables": self.page_tables,
            "query_stride": self.query.stride(0),
            "key_page_stride": self.pages.keys.stride(0),
            "value_page_stride": self.pages.values.stride(0),
            "scale_page_stride": 0 if scales is None else scales.stride(0),
            "QUANTISED": scales is not None,
            "page_table_stride": self.page_tables.stride(0),
            "scale_log2": self.scale * _LOG2_E,
            "soft_cap": (self.soft_cap or 0.0) * _LOG2_E,
            "PAGE_SIZE": self.pages.keys.shape[2],
            "HAS_SOFT_CAP": self.soft_cap is not None,
        }


def _padded(head_dim: int) -> int:
    """Columns of a tile that holds a head."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def _tile_arguments(tiles: Tiles) -> dict[str, object]:
    return {"BLOCK_M": tiles.block_m, "TILE": tiles.tile}
