"""Paged attention against float64 in poisoned pools, and its rows bit by bit."""

import dataclasses
import itertools
import random

import pytest
import torch
from kernel_cases import (
    Chunk,
    Heads,
    PagedBatch,
    assert_close,
    attention_oracle,
    check_attention,
    check_attention_bits,
    check_merge_state,
    check_order_of_pairs,
    check_shared_beginnings,
    check_states,
    check_unseen,
    random_sequence,
    relative_error,
)

SHAPES = [
    Heads(2, 2, 8, page_size=4),
    Heads(4, 2, 16, page_size=16, soft_cap=20.0),
    Heads(4, 1, 32, page_size=64, window=30),
    Heads(8, 1, 40, page_size=1),
    Heads(6, 2, 64, page_size=16, window=1),
    Heads(8, 4, 72, page_size=7, soft_cap=30.0, window=300),
    Heads(2, 2, 80, page_size=16, window=256),
    Heads(3, 3, 96, page_size=4),
    Heads(4, 2, 128, page_size=16, window=17),
    Heads(4, 4, 256, page_size=64, soft_cap=50.0),
    Heads(60, 1, 16, page_size=16),  # a group larger than a block
    Heads(4, 1, 512, page_size=16),
    Heads(4, 2, 64, page_size=32),
    Heads(8, 4, 128, page_size=128, window=200),
]


def shape_id(heads):
    return (
        f"{heads.num_heads}q{heads.num_kv_heads}kv-d{heads.head_dim}-p{heads.page_size}"
        f"-w{heads.window}-c{heads.soft_cap}"
    )


@pytest.fixture(autouse=True)
def _random(seed):
    random.seed(seed)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("heads", SHAPES, ids=shape_id)
def test_attention_over_poisoned_pages(ops, dtype, page_dtype, heads, sinks):
    if sinks:
        heads = dataclasses.replace(heads, sinks=torch.randn(heads.num_heads) * 2)
    check_attention(ops, heads, dtype, page_dtype)


def test_prefill_from_the_first_token(ops, dtype, page_dtype):
    heads = Heads(4, 2, 64)
    chunk = Chunk(random_sequence(heads, 300, dtype, page_dtype), 0, 300)
    out = PagedBatch(heads, [chunk], dtype, page_dtype).attend(ops)
    assert_close(out, attention_oracle(heads, chunk), dtype)


def test_strided_queries_and_a_sequence_without_any(ops):
    heads = Heads(4, 2, 16)
    chunks = [
        Chunk(random_sequence(heads, 20, torch.float32), 18, 20),
        Chunk(random_sequence(heads, 9, torch.float32), 9, 9),
        Chunk(random_sequence(heads, 33, torch.float32), 32, 33),
    ]
    batch = PagedBatch(heads, chunks, torch.float32)
    wide = torch.full((3, 10, 16), torch.nan)
    wide[:, :4] = batch.query
    batch.query = wide[:, :4]
    expected = torch.cat([attention_oracle(heads, chunk) for chunk in (chunks[0], chunks[2])])
    assert_close(batch.attend(ops), expected, torch.float32)


def test_pages_before_the_window_may_hold_anything(ops, dtype, page_dtype):
    """They may have been given to others."""
    heads = Heads(4, 2, 32, window=20)
    chunk = Chunk(random_sequence(heads, 100, dtype, page_dtype), 90, 100)
    batch = PagedBatch(heads, [chunk], dtype, page_dtype)
    # The first query sees keys from 71 on: page 4 and later.
    for page in batch.page_tables[0, :4].tolist():
        batch.pool[page] = 255
    assert_close(batch.attend(ops), attention_oracle(heads, chunk), dtype)


def test_far_scores_take_all_or_nothing(ops):
    """No overflow: scores of several thousand, of both signs."""
    heads = Heads(2, 1, 16)
    sequence = random_sequence(heads, 40, torch.float32)
    sequence.query *= 3000
    chunk = Chunk(sequence, 0, 40)
    out = PagedBatch(heads, [chunk], torch.float32).attend(ops)
    # A score of 5,000 is known to 5e-4 in float32, and so is its weight.
    assert relative_error(out, attention_oracle(heads, chunk)) < 1e-2


@pytest.mark.parametrize(
    "heads",
    [
        Heads(4, 2, 64, soft_cap=20.0),
        Heads(8, 1, 40, page_size=4),
        Heads(2, 2, 128, window=30, sinks=torch.tensor([3.0, -3.0])),
    ],
    ids=shape_id,
)
def test_weights_of_the_means(ops, dtype, page_dtype, heads):
    check_states(ops, heads, dtype, "cpu", page_dtype)


def test_merging_parts(ops, dtype):
    check_merge_state(ops, dtype, "cpu")


EXACT_SHAPES = [
    Heads(4, 2, 64),
    Heads(8, 1, 40, page_size=4, soft_cap=20.0),
    Heads(2, 2, 128, page_size=128, window=270),
    Heads(16, 8, 16, window=33),
    Heads(4, 2, 136),
]


@pytest.mark.parametrize("heads", EXACT_SHAPES, ids=shape_id)
@pytest.mark.parametrize("kept", [None, torch.int8], ids=["unquantised", "int8"])
def test_chunks_mates_pages_and_threads_change_no_bit(on_threads, dtype, kept, heads):
    check_attention_bits(on_threads(1), on_threads(3), heads, dtype, kept)


@pytest.mark.parametrize(
    "heads",
    [
        *EXACT_SHAPES,
        Heads(16, 2, 32, page_size=7, soft_cap=20.0),
        Heads(60, 1, 8, page_size=32, sinks=torch.randn(60)),
    ],
    ids=shape_id,
)
@pytest.mark.parametrize("kept", [None, torch.int8], ids=["unquantised", "int8"])
def test_shared_beginnings_change_no_bit(on_threads, dtype, kept, heads):
    check_shared_beginnings(on_threads(1), on_threads(3), heads, dtype, kept)


@pytest.mark.parametrize("kept", [None, torch.int8], ids=["unquantised", "int8"])
def test_what_a_query_does_not_see_never_shows(exact_ops, dtype, kept):
    check_unseen(exact_ops, dtype, kept)


def test_the_order_of_two_keys_of_one_step(exact_ops, dtype):
    check_order_of_pairs(exact_ops, dtype)


def test_a_key_or_value_that_is_no_number_spoils_what_sees_it(ops, page_dtype):
    """The engine finds such rows by their logits: nothing may hide them."""
    heads = Heads(4, 2, 32)
    for part, spoilt in itertools.product(("key", "value"), (torch.nan, torch.inf)):
        sequence = random_sequence(heads, 60, torch.float32, page_dtype)
        getattr(sequence, part)[30, 1, 5] = spoilt
        sequence.query[:] = 0.0  # all weights are alike: none is rounded to nothing
        sequence.query[..., 5] = 1.0
        out = PagedBatch(heads, [Chunk(sequence, 0, 60)], torch.float32, page_dtype).attend(ops)
        assert not out[30:, 2:].isfinite().all(dim=-1).any()
