"""Rows against a plain model of them: the tensors hold what was added and appended."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaging.base.ids import PageId, SeqId
from kvpaging.execution.batch_builder import BatchBuilder
from kvpaging.execution.growing import GrowingTable
from kvpaging.scheduling.plan import AddedSequence, ScheduledSequence
from kvpaging.scheduling.request import SamplingParams

SAMPLING = SamplingParams(max_new_tokens=1, seed=0)


class PlainRow:
    """A sequence as lists."""

    def __init__(self, tokens: list[int], pages: list[int]) -> None:
        self.tokens = tokens
        self.pages = pages
        self.start = 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), page_size=st.sampled_from([1, 3, 4, 16]))
def test_tensors_are_what_the_rows_say(seed: int, page_size: int) -> None:
    choose = random.Random(seed)
    builder = BatchBuilder(page_size, torch.device("cpu"))
    rows: dict[SeqId, PlainRow] = {}
    next_id = 0
    for _ in range(12):
        for seq_id in [seq_id for seq_id in rows if choose.random() < 0.2]:
            builder.remove(seq_id)
            del rows[seq_id]
        for _ in range(choose.randrange(4) + (not rows)):
            next_id += 1
            tokens = [choose.randrange(1000) for _ in range(choose.randrange(1, 400))]
            rows[SeqId(next_id)] = PlainRow(tokens, [])
            builder.add(AddedSequence(SeqId(next_id), tuple(tokens), 1, (), SAMPLING, 0))
        scheduled, expected = [], []
        for seq_id, row in choose.sample(sorted(rows.items()), choose.randint(1, len(rows))):
            count = choose.randint(1, len(row.tokens) - row.start)
            end = row.start + count
            new = [choose.randrange(1, 10**6) for _ in range(-(-end // page_size) - len(row.pages))]
            row.pages += new
            samples = (0,) if end == len(row.tokens) else ()
            scheduled.append(
                ScheduledSequence(seq_id, row.start, count, tuple(map(PageId, new)), samples)
            )
            expected.append((row, row.start, end, samples))
            row.start = end
        batch = builder.build(scheduled)
        check(batch, expected, page_size)
        sampled = [
            (entry.seq_id, row)
            for entry, (row, _, _, samples) in zip(scheduled, expected, strict=True)
            if samples
        ]
        new_tokens = [choose.randrange(1000) for _ in sampled]
        builder.append(
            np.array([builder.row_of(seq_id) for seq_id, _ in sampled], dtype=np.int64),
            torch.tensor(new_tokens, dtype=torch.int64),
        )
        for (_, row), token_id in zip(sampled, new_tokens, strict=True):
            row.tokens.append(token_id)
        for seq_id in [seq_id for seq_id, row in rows.items() if row.start == len(row.tokens)]:
            builder.remove(seq_id)
            del rows[seq_id]


def check(
    batch: object,
    expected: list[tuple[PlainRow, int, int, tuple[int, ...]]],
    page_size: int,
) -> None:
    tokens, positions, slots, logit_rows, starts = [], [], [], [], [0]
    for row, start, end, samples in expected:
        tokens += row.tokens[start:end]
        positions += range(start, end)
        slots += [row.pages[p // page_size] * page_size + p % page_size for p in range(start, end)]
        starts.append(len(tokens))
        logit_rows += [len(tokens) - 1] if samples else []
    assert batch.token_ids.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.slot_mapping.tolist() == slots
    assert batch.query_starts.tolist() == starts
    assert batch.logit_rows.tolist() == logit_rows
    assert batch.seq_lens.tolist() == [end for _, _, end, _ in expected]
    for table, (row, _, end, _) in zip(batch.page_tables.tolist(), expected, strict=True):
        count = -(-end // page_size)
        assert table[:count] == row.pages[:count]
    int64, int32 = torch.int64, torch.int32
    kinds = [batch.token_ids, batch.slot_mapping, batch.logit_rows]
    assert {tensor.dtype for tensor in kinds} == {int64}
    kinds = [batch.positions, batch.page_tables, batch.seq_lens, batch.query_starts]
    assert {tensor.dtype for tensor in kinds} == {int32}
    last = batch.last_rows
    if len(logit_rows) == len(tokens):
        assert last is None
        return
    which = [i for i, (_, _, _, samples) in enumerate(expected) if samples] or [0]
    assert last.rows.tolist() == [starts[i + 1] - 1 for i in which]
    assert torch.equal(last.page_tables, batch.page_tables[which])
    assert torch.equal(last.seq_lens, batch.seq_lens[which])
    assert last.query_starts.tolist() == list(range(len(which) + 1))
    assert last.rows.dtype == int64
    assert {last.page_tables.dtype, last.seq_lens.dtype, last.query_starts.dtype} == {int32}


def test_all_rows_are_computed_where_a_prompt_is_scored() -> None:
    builder = BatchBuilder(4, torch.device("cpu"))
    builder.add(AddedSequence(SeqId(1), (5, 6, 7), 3, (PageId(1),), SAMPLING, 0))
    entry = ScheduledSequence(SeqId(1), 0, 2, (), (), prompt_logprobs=0)
    assert builder.build([entry]).last_rows is None
    entry = ScheduledSequence(SeqId(1), 0, 2, (), ())
    assert builder.build([entry]).last_rows is not None


def test_a_table_grows_both_ways_and_keeps_its_contents() -> None:
    table = GrowingTable(num_rows=1, num_columns=2)
    table.replace(0, [5])
    table.replace(3, range(9))
    table.extend(0, [6, 7])
    assert table.row(0).tolist() == [5, 6, 7]
    assert table.row(1).tolist() == []
    assert table.row(3).tolist() == list(range(9))
    table.replace(3, [1])
    assert table.row(3).tolist() == [1]


def test_a_sequence_that_is_unknown_is_our_fault() -> None:
    builder = BatchBuilder(4, torch.device("cpu"))
    with pytest.raises(KeyError):
        builder.build([ScheduledSequence(SeqId(1), 0, 1, (), ())])
