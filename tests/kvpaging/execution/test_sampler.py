"""Edits, draws and log-probabilities, each row by itself."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from ops_paths import cpu_paths

from kernels import registry
from kvpaging.base.ids import SeqId
from kvpaging.execution import logits_edits
from kvpaging.execution.sampler import Draws, Sampler
from kvpaging.execution.transfer import to_device
from kvpaging.scheduling.plan import AddedSequence, Sample
from kvpaging.scheduling.request import SamplingParams

CPU = torch.device("cpu")
VOCAB = 50
EOS = 7


@pytest.fixture(params=cpu_paths())
def ops(request: pytest.FixtureRequest) -> registry.Ops:
    return registry.select(CPU, prefer=request.param, threads=1)


@pytest.fixture
def sampler(ops: registry.Ops) -> Sampler:
    return Sampler(ops, VOCAB, [EOS], CPU)


def sequence(
    tokens: tuple[int, ...] = (1, 2, 3), num_prompt: int = 3, **sampling: Any
) -> AddedSequence:
    params = SamplingParams(**{"max_new_tokens": 10, "seed": 0, "temperature": 0.0, **sampling})
    return AddedSequence(SeqId(0), tokens, num_prompt, (), params, 0)


def draws(rows: list[int], position: int = 3, logit_rows: list[int] | None = None) -> Draws:
    count = len(rows)
    return Draws(
        rows=np.array(rows),
        logit_rows=np.array(range(count) if logit_rows is None else logit_rows),
        output_indices=np.arange(count, dtype=np.int32) * (logit_rows is not None),
        positions=np.full(count, position, dtype=np.int32),
    )


def drawn(sampler: Sampler, logits: torch.Tensor, order: Draws) -> list[Sample | None]:
    found = sampler.draw(logits, order)
    return found.samples(found.tensors)


def scored(
    sampler: Sampler, logits: torch.Tensor, token_ids: np.ndarray, num_top: int
) -> list[Sample | None]:
    found = sampler.score(logits, token_ids, num_top)
    return found.samples(found.tensors)


def one(sampler: Sampler, logits: torch.Tensor, added: AddedSequence, position: int = 3) -> Sample:
    sampler.add(0, added)
    (sample,) = drawn(sampler, logits.clone().unsqueeze(0), draws([0], position))
    assert sample is not None
    return sample


def random_logits(seed: int = 0, rows: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (VOCAB,) if rows is None else (rows, VOCAB)
    return torch.randn(shape, generator=generator) * 2


def test_greedy_takes_the_largest_and_the_lowest_id_on_a_tie(sampler: Sampler) -> None:
    logits = torch.zeros(VOCAB)
    logits[[30, 12, 41]] = 5.0
    assert one(sampler, logits, sequence()) == Sample(12)


def test_bias_is_added(sampler: Sampler) -> None:
    logits = torch.zeros(VOCAB)
    logits[4] = 1.0
    assert one(sampler, logits, sequence(logit_bias=((9, 1.5),))).token_id == 9
    assert one(sampler, logits, sequence(logit_bias=((9, 0.5),))).token_id == 4
    assert one(sampler, logits, sequence(logit_bias=((4, -100.0), (9, -1.0)))).token_id == 0


def test_repetition_looks_at_prompt_and_output(sampler: Sampler) -> None:
    logits = torch.full((VOCAB,), -9.0)
    logits[2], logits[20], logits[30] = 3.0, 2.0, 1.8
    penalised = {"repetition_penalty": 2.0}
    assert one(sampler, logits, sequence()).token_id == 2
    assert one(sampler, logits, sequence(**penalised)).token_id == 20  # 2 is in the prompt
    said = sequence((1, 2, 3, 20), 3, **penalised)
    assert one(sampler, logits, said).token_id == 30
    negative = torch.full((VOCAB,), -9.0)
    negative[2], negative[20] = -1.0, -1.5
    assert one(sampler, negative, sequence(**penalised)).token_id == 20  # -1 * 2 < -1.5


def test_presence_and_frequency_look_at_the_output_only(sampler: Sampler) -> None:
    logits = torch.full((VOCAB,), -9.0)
    logits[2], logits[20] = 3.0, 2.2
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert one(sampler, logits, sequence(**{penalty: 1.0})).token_id == 2
        assert one(sampler, logits, sequence((1, 2), 1, **{penalty: 1.0})).token_id == 20
        twice = sequence((1, 2, 2), 1, **{penalty: 0.5})
        assert one(sampler, logits, twice).token_id == (20 if "freq" in penalty else 2)


def test_what_was_said_since_counts_too(sampler: Sampler) -> None:
    logits = torch.full((VOCAB,), -9.0)
    logits[2], logits[20], logits[30] = 3.0, 2.9, 2.8
    sampler.add(0, sequence((1,), 1, frequency_penalty=1.0))
    seen = []
    for _ in range(6):
        (sample,) = drawn(sampler, logits.clone().unsqueeze(0), draws([0]))
        assert sample is not None
        seen.append(sample.token_id)
        sampler.append(np.array([0]), torch.tensor([sample.token_id]))
    assert seen == [2, 20, 30, 2, 20, 30]


def test_a_repetition_of_what_was_said_since_counts(sampler: Sampler) -> None:
    logits = torch.full((VOCAB,), -9.0)
    logits[20], logits[30] = 3.0, 2.0
    sampler.add(0, sequence((1,), 1, repetition_penalty=2.0))
    seen = []
    for _ in range(2):
        (sample,) = drawn(sampler, logits.clone().unsqueeze(0), draws([0]))
        assert sample is not None
        seen.append(sample.token_id)
        sampler.append(np.array([0]), torch.tensor([sample.token_id]))
    assert seen == [20, 30]


def test_what_edits_keep_goes_to_the_device_by_pinned_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[torch.Tensor] = []

    def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
        sent.append(to_device(array, device))
        return sent[-1]

    monkeypatch.setattr(logits_edits, "to_device", send)
    params = SamplingParams(
        max_new_tokens=10, seed=0, logit_bias=((3, 1.0),), frequency_penalty=1.0, min_new_tokens=4
    )
    edits = logits_edits.edits_for(params, (1, 2, 3), 2, [EOS], VOCAB, CPU)
    held = [each for edit in edits for each in vars(edit).values() if torch.is_tensor(each)]
    # All but the 1 that counts are raised by, which is made there.
    assert [id(each) for each in held if each.numel() > 1 or each.dtype != torch.int32] == [
        id(each) for each in sent
    ]
    assert len(edits) == 3


def test_ends_are_forbidden_until_the_output_is_long_enough(sampler: Sampler) -> None:
    logits = torch.zeros(VOCAB)
    logits[EOS], logits[11], logits[12] = 9.0, 8.0, 7.0
    sampler.add(0, sequence(min_new_tokens=2, stop_token_ids=(11,)))
    seen = []
    for _ in range(3):
        (sample,) = drawn(sampler, logits.clone().unsqueeze(0), draws([0]))
        assert sample is not None
        seen.append(sample.token_id)
        sampler.append(np.array([0]), torch.tensor([sample.token_id]))
    assert seen == [12, 12, EOS]
    # Two tokens of output are known already: nothing is owed.
    assert one(sampler, logits, sequence((1, 5, 6), 1, min_new_tokens=2)).token_id == EOS
    # An end that doesn't end anything is a token like others.
    ignoring = sequence(min_new_tokens=2, ignore_eos=True, stop_token_ids=(11,))
    assert one(sampler, logits, ignoring).token_id == EOS


def test_logprobs_are_of_the_raw_logits_in_order(sampler: Sampler) -> None:
    logits = random_logits()
    logits[[40, 10, 25]] = 9.0  # three at the top, equal
    expected = logits.double().log_softmax(0)
    sample = one(sampler, logits, sequence(logprobs=4, temperature=0.7, logit_bias=((33, 100.0),)))
    assert sample.token_id == 33
    assert sample.logprob == pytest.approx(float(expected[33]), abs=1e-5)
    ids = [token_id for token_id, _ in sample.top]
    rest = expected.clone()
    rest[[10, 25, 40]] = -math.inf
    assert ids == [10, 25, 40, int(rest.argmax())]
    for token_id, value in sample.top:
        assert value == pytest.approx(float(expected[token_id]), abs=1e-5)


def test_logprobs_zero_gives_the_chosen_one_alone(sampler: Sampler) -> None:
    sample = one(sampler, random_logits(), sequence(logprobs=0))
    assert sample.top == ()
    assert sample.logprob is not None
    assert one(sampler, random_logits(), sequence()).logprob is None


def test_rows_that_want_more_and_less_are_looked_at_together(sampler: Sampler) -> None:
    """Equal values at the end of what a row wants, and all of its values, too."""
    logits = random_logits(4, rows=5).round()
    counts = [3, 0, 2, VOCAB, None]
    for row, count in enumerate(counts):
        sampler.add(row, sequence(logprobs=count))
    found = drawn(sampler, logits.clone(), draws([0, 1, 2, 3, 4]))
    num_cut = 0
    for row, (sample, count) in enumerate(zip(found, counts, strict=True)):
        assert sample is not None
        order = sorted(range(VOCAB), key=lambda i, row=row: (-logits[row, i].item(), i))
        assert [token_id for token_id, _ in sample.top] == order[: count or 0]
        if count in (2, 3):
            num_cut += bool(logits[row, order[count - 1]] == logits[row, order[count]])
    assert num_cut > 0, "no equal values were cut"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_number_fails_alone(sampler: Sampler, bad: float) -> None:
    logits = random_logits(rows=3)
    for row in range(3):
        sampler.add(row, sequence(temperature=1.0, seed=row, logprobs=2))
    whole = drawn(sampler, logits.clone(), draws([0, 1, 2]))
    logits[1, 17] = bad
    broken = drawn(sampler, logits.clone(), draws([0, 1, 2]))
    assert broken[1] is None
    assert (broken[0], broken[2]) == (whole[0], whole[2])


def test_a_row_depends_on_nothing_but_itself(sampler: Sampler) -> None:
    logits = random_logits(rows=6)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 2**64 - 1},
        {"temperature": 0.8, "seed": 5, "top_k": 5},
        {"temperature": 1.2, "seed": 6, "top_p": 0.6, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 7, "min_p": 0.1, "logprobs": 3},
        {"temperature": 1.0, "seed": 8, "logit_bias": ((4, 3.0),), "presence_penalty": 0.5},
    ]
    for row, kind in enumerate(kinds):
        sampler.add(row, sequence(**kind))
    together = drawn(sampler, logits.clone(), draws([0, 1, 2, 3, 4, 5]))
    backwards = drawn(sampler, logits.flip(0).clone(), draws([5, 4, 3, 2, 1, 0]))
    alone = [drawn(sampler, logits[[row]].clone(), draws([row]))[0] for row in range(6)]
    assert together == alone == backwards[::-1]


def test_seed_output_index_and_position_decide(sampler: Sampler) -> None:
    logits = torch.zeros(VOCAB)  # all tokens alike
    taken = {
        (seed, position): one(
            sampler, logits, sequence(temperature=1.0, seed=seed), position
        ).token_id
        for seed in range(8)
        for position in range(8)
    }
    assert len(set(taken.values())) > 20
    sampler.add(0, sequence(temperature=1.0, seed=3))
    forked = drawn(sampler, logits.clone().unsqueeze(0), draws([0] * 8, logit_rows=[0] * 8))
    assert len({sample.token_id for sample in forked if sample}) > 3
    assert forked[0] == Sample(taken[3, 3])


def test_rows_grow_and_are_reused(sampler: Sampler) -> None:
    logits = torch.zeros(VOCAB)
    logits[4] = 1.0
    sampler.add(40, sequence(logit_bias=((9, 5.0),)))
    (sample,) = drawn(sampler, logits.clone().unsqueeze(0), draws([40]))
    assert sample == Sample(9)
    sampler.remove(40)
    sampler.add(40, sequence())
    (sample,) = drawn(sampler, logits.clone().unsqueeze(0), draws([40]))
    assert sample == Sample(4)


def test_scores_are_what_a_draw_says_and_a_row_that_is_no_number_has_none(
    sampler: Sampler,
) -> None:
    logits = random_logits(rows=5)
    logits[3, 8] = math.inf
    next_ids = np.array([4, 0, VOCAB - 1, 8, 4])
    scores = scored(sampler, logits, next_ids, 2)
    assert scores[3] is None
    for row in (0, 1, 2, 4):
        found, expected = scores[row], logits[row].double().log_softmax(0)
        drawn = one(sampler, logits[row], sequence(logprobs=2, logit_bias=((5, 9.0),)))
        assert found is not None
        assert found.token_id == next_ids[row]
        assert found.logprob == pytest.approx(float(expected[next_ids[row]]), abs=1e-5)
        assert found.top == drawn.top
    assert scores[0] == scored(sampler, logits[:1], next_ids[:1], 2)[0]


@pytest.mark.parametrize("num_top", [0, 2])
def test_scores_hold_no_whole_rows(sampler: Sampler, num_top: int) -> None:
    """A long prompt is scored in parts, and all of them wait for the end of the step."""
    num_rows = 8
    found = sampler.score(random_logits(rows=num_rows), np.arange(num_rows), num_top)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for part in (found, found.scored)
        for field in dataclasses.fields(part)
        if isinstance(tensor := getattr(part, field.name), torch.Tensor)
    }
    assert sum(held.values()) <= num_rows * (5 + 20 * num_top)
