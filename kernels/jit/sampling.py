"""Draws one token per row without sorting.

Probabilities are whole numbers (multiples of 2^-40 of the largest): their sums are exact in any
order, so nothing about a draw depends on how the row was cut into blocks. The `top_k` and `top_p`
sets are prefixes of the order "larger logit first, lower id first"; such a prefix is known by its
last logit and the last id with that logit, which a search over the logits' bit patterns finds.

Meaning: `kernels.ops.Ops.sample`. Knows nothing of penalties and grammars.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.jit.launch import Launch, Schedule

_BLOCK = 2048


@triton.jit
def _values(row, token, width):
    """Logits of the tokens; NaN is never drawn, and nothing lies past the row's end."""
    value = tl.load(row + token, mask=token < width, other=float("-inf"))
    return tl.where(value != value, float("-inf"), tl.where(value == 0.0, 0.0, value))


@triton.jit
def _key(value):
    """A whole number that orders as the float does. Its own inverse on the bits."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _weight(value, largest, temperature):
    """exp((value - largest) / temperature) in units of 2^-40; equal infinities are 0 apart."""
    apart = tl.where(value == largest, 0.0, value - largest)
    return (tl.exp(apart / temperature) * 1099511627776.0).to(tl.int64)


@triton.jit
def _is_kept(key, token, threshold, last_tie):
    """Membership in the prefix that ends with logit `threshold` and id `last_tie`."""
    return (key > threshold) | ((key == threshold) & (token <= last_tie))


@triton.jit
def _sum_kept(row, width, largest, temperature, threshold, last_tie, least, BLOCK: tl.constexpr):
    """The prefix's sum of weights, of those that are at least `least`."""
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.int64)
    for start in tl.range(0, width, BLOCK):
        token = start + lane
        value = _values(row, token, width)
        weight = _weight(value, largest, temperature)
        kept = _is_kept(_key(value), token, threshold, last_tie) & (token < width)
        sums += tl.where(kept & (weight >= least), weight, 0)
    return tl.sum(sums, 0)


@triton.jit
def _shorten(
    row,
    width,
    largest,
    temperature,
    threshold,
    last_tie,
    whole,
    goal,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The shortest prefix within the given one whose measure reaches `goal`, 1 <= goal <= whole.

    The measure is the sum of weights, or without WEIGHTED the number of tokens; `whole` is that of
    the given prefix. Returns the new (threshold, last_tie).
    """
    lane = tl.arange(0, BLOCK)
    # Largest key whose "at least this" measures goal or more: low fits, high does not.
    low = goal * 0 - 2147483649
    high = _key(largest) + 1
    low_measure = whole
    high_measure = goal * 0
    while (high - low > 1) & (low_measure != goal):
        quarter = tl.maximum((high - low) // 4, 1)
        sums_1 = tl.zeros([BLOCK], dtype=tl.int64)
        sums_2 = tl.zeros([BLOCK], dtype=tl.int64)
        sums_3 = tl.zeros([BLOCK], dtype=tl.int64)
        for start in tl.range(0, width, BLOCK):
            token = start + lane
            value = _values(row, token, width)
            key = _key(value)
            kept = _is_kept(key, token, threshold, last_tie) & (token < width)
            if WEIGHTED:
                amount = tl.where(kept, _weight(value, largest, temperature), 0)
            else:
                amount = kept.to(tl.int64)
            sums_1 += tl.where(key >= low + quarter, amount, 0)
            sums_2 += tl.where(key >= low + 2 * quarter, amount, 0)
            sums_3 += tl.where(key >= low + 3 * quarter, amount, 0)
        measure_1 = tl.sum(sums_1, 0)
        measure_2 = tl.sum(sums_2, 0)
        measure_3 = tl.sum(sums_3, 0)
        fits_1 = measure_1 >= goal
        fits_2 = measure_2 >= goal
        fits_3 = measure_3 >= goal
        base = low
        low = tl.where(fits_1, base + quarter, low)
        low = tl.where(fits_2, base + 2 * quarter, low)
        low = tl.where(fits_3, base + 3 * quarter, low)
        low_measure = tl.where(fits_1, measure_1, low_measure)
        low_measure = tl.where(fits_2, measure_2, low_measure)
        low_measure = tl.where(fits_3, measure_3, low_measure)
        high = tl.where(fits_3, high, tl.minimum(high, base + 3 * quarter))
        high = tl.where(fits_2, high, tl.minimum(high, base + 2 * quarter))
        high = tl.where(fits_1, high, tl.minimum(high, base + quarter))
        high_measure = tl.where(fits_3, high_measure, measure_3)
        high_measure = tl.where(fits_2, high_measure, measure_2)
        high_measure = tl.where(fits_1, high_measure, measure_1)

    if low_measure == goal:  # all that are at least `low`
        threshold = low - 1
        last_tie = last_tie * 0 - 1
    else:
        # Of the ties at `low` as many as are still missing, lowest ids first.
        missing = goal - high_measure
        if WEIGHTED:
            bits = low.to(tl.int32)
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            one = _weight(bits.to(tl.float32, bitcast=True), largest, temperature)
            missing = (missing + one - 1) // tl.maximum(one, 1)
        found = goal * 0
        last = last_tie * 0 - 1
        for start in tl.range(0, width, BLOCK):
            token = start + lane
            key = _key(_values(row, token, width))
            is_tie = (key == low) & _is_kept(key, token, threshold, last_tie) & (token < width)
            place = found + tl.cumsum(is_tie.to(tl.int64), 0)
            taken = is_tie & (place <= missing)
            last = tl.maximum(last, tl.max(tl.where(taken, token, -1), 0))
            found += tl.sum(is_tie.to(tl.int64), 0)
        threshold = low
        last_tie = last
    return threshold, last_tie


@triton.jit
def sample_kernel(
    out,
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    output_indices,
    positions,
    stride,
    width,
    BLOCK: tl.constexpr,
):
    """Program (row): the token drawn."""
    row_index = tl.program_id(0)
    row = logits + row_index.to(tl.int64) * stride
    temperature = tl.load(temperatures + row_index)
    lane = tl.arange(0, BLOCK)

    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    best_token = lane
    for start in tl.range(0, width, BLOCK):
        token = start + lane
        value = _values(row, token, width)
        best_token = tl.where(value > best, token, best_token)
        best = tl.maximum(best, value)
    largest = tl.max(best, 0)
    drawn = tl.min(tl.where(best == largest, best_token, width), 0).to(tl.int64)

    if temperature > 0.0:
        # At first the prefix is the whole row.
        threshold = drawn * 0 - 2147483649
        last_tie = tl.min(lane, 0) - 1
        top_k = tl.load(top_ks + row_index)
        if (top_k > 0) & (top_k < width):
            threshold, last_tie = _shorten(
                row,
                width,
                largest,
                temperature,
                threshold,
                last_tie,
                drawn * 0 + width,
                top_k.to(tl.int64),
                False,
                BLOCK,
            )
        top_p = tl.load(top_ps + row_index).to(tl.float64)
        if top_p < 1.0:
            whole = _sum_kept(row, width, largest, temperature, threshold, last_tie, 0, BLOCK)
            share = top_p * whole.to(tl.float64)
            goal = share.to(tl.int64)
            goal += (goal.to(tl.float64) < share).to(tl.int64)
            goal = tl.minimum(tl.maximum(goal, 1), whole)
            threshold, last_tie = _shorten(
                row, width, largest, temperature, threshold, last_tie, whole, goal, True, BLOCK
            )
        floor = tl.load(min_ps + row_index).to(tl.float64) * 1099511627776.0
        least = floor.to(tl.int64)
        least += (least.to(tl.float64) < floor).to(tl.int64)
        least = tl.minimum(least, 1099511627776)
        whole = _sum_kept(row, width, largest, temperature, threshold, last_tie, least, BLOCK)

        # 53 bits of Philox 4x32-10 under (seed; position, output index), as kernels.reference.
        zero = tl.load(positions + row_index) * 0
        first, second, _, _ = tl.philox(
            tl.load(seeds + row_index),
            tl.load(positions + row_index),
            tl.load(output_indices + row_index),
            zero,
            zero,
            10,
        )
        fraction = (first >> 5).to(tl.int64) * 67108864 + (second >> 6).to(tl.int64)
        uniform = fraction.to(tl.float64) * 1.1102230246251565e-16
        target = tl.minimum((uniform * whole.to(tl.float64)).to(tl.int64), whole - 1)

        # Inverse CDF over ascending ids: the block first, then the place in it.
        running = drawn * 0
        before = drawn * 0
        block = last_tie * 0
        for start in tl.range(0, width, BLOCK):
            token = start + lane
            value = _values(row, token, width)
            weight = _weight(value, largest, temperature)
            kept = _is_kept(_key(value), token, threshold, last_tie) & (token < width)
            amount = tl.sum(tl.where(kept & (weight >= least), weight, 0), 0)
            is_here = (running <= target) & (running + amount > target)
            block = tl.where(is_here, start, block)
            before = tl.where(is_here, running, before)
            running += amount
        token = block + lane
        value = _values(row, token, width)
        weight = _weight(value, largest, temperature)
        kept = _is_kept(_key(value), token, threshold, last_tie) & (token < width)
        cdf = before + tl.cumsum(tl.where(kept & (weight >= least), weight, 0), 0)
        drawn = block + tl.sum((cdf <= target).to(tl.int64), 0)
    tl.store(out + row_index, drawn)


def sample_launch(
    out: torch.Tensor,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    output_indices: torch.Tensor,
    positions: torch.Tensor,
) -> Launch:
    """Fill `out [R]` int64 from `logits [R, V]` float32."""
    num_rows, width = logits.shape
    return Launch(
        sample_kernel,
        (num_rows,),
        {
            "out": out,
            "logits": logits,
            "temperatures": temperature,
            "top_ks": top_k,
            "top_ps": top_p,
            "min_ps": min_p,
            "seeds": seeds,
            "output_indices": output_indices,
            "positions": positions,
            "stride": logits.stride(0),
            "width": width,
            "BLOCK": min(_BLOCK, triton.next_power_of_2(width)),
        },
        Schedule(num_warps=8, num_stages=1),
    )
