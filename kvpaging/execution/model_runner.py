"""Runs the model for one step: rows to tensors, hidden states, logits, samples.

Keeps a row for each sequence between steps and appends to it what it samples. Never sees a queue;
which sequence runs was decided by the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch

from kernels.ops import Ops
from kvpaging.base.ids import SeqId
from kvpaging.execution.batch_builder import BatchBuilder
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.models.layers import CausalLM
from kvpaging.execution.sampler import Draws, Sampler
from kvpaging.scheduling.plan import AddedSequence, Sample, ScheduledSequence

Samples = tuple[tuple[Sample, ...], ...]

SCORED_ROWS: Final = 64
"""Prompt tokens whose logits are held at once: a long chunk's would fill the memory."""


class StepSamples(NamedTuple):
    """What a step has to say; see `StepResult` for each."""

    samples: Samples
    failed: tuple[SeqId, ...] = ()
    prompt_logprobs: Samples = ()


class ModelRunner:
    """One model, its pool, and the rows of the sequences it works on."""

    def __init__(
        self, model: CausalLM, pool: KVPool, ops: Ops, eos_token_ids: Collection[int]
    ) -> None:
        device = pool.pages.device
        self._model = model
        self._pool = pool
        self._builder = BatchBuilder(pool.spec.page_size, device)
        self._sampler = Sampler(ops, model.config.vocab_size, eos_token_ids, device)
        self._output_index: dict[SeqId, int] = {}
        self._num_prompt_tokens: dict[SeqId, int] = {}

    def add(self, sequence: AddedSequence) -> None:
        """Give a sequence a row."""
        row = self._builder.add(sequence)
        self._sampler.add(row, sequence)
        self._output_index[sequence.seq_id] = sequence.output_index
        self._num_prompt_tokens[sequence.seq_id] = sequence.num_prompt_tokens

    def remove(self, seq_id: SeqId) -> None:
        """Drop a sequence's row."""
        self._sampler.remove(self._builder.remove(seq_id))
        del self._output_index[seq_id], self._num_prompt_tokens[seq_id]

    def run(self, scheduled: Sequence[ScheduledSequence]) -> StepSamples:
        """Compute the step's tokens and sample where the plan says so.

        Writes keys and values to the pool, and appends to each sampled row the token drawn for its
        own output index. A sequence whose logits aren't finite gets no samples and is named; which
        logits are looked at is the plan's choice.
        """
        batch = self._builder.build(scheduled)
        hidden = self._model.forward(batch, self._pool)
        samples, failed = self._sample(scheduled, batch.logit_rows, hidden)
        if all(entry.prompt_logprobs is None for entry in scheduled):
            return StepSamples(samples, failed)
        prompt_logprobs, not_finite = self._score(scheduled, hidden)
        failed = tuple(dict.fromkeys(failed + not_finite))
        return StepSamples(samples, failed, prompt_logprobs)

    def _sample(
        self,
        scheduled: Sequence[ScheduledSequence],
        logit_rows: torch.Tensor,
        hidden: torch.Tensor,
    ) -> tuple[Samples, tuple[SeqId, ...]]:
        sampling = [entry for entry in scheduled if entry.sample_for]
        if not sampling:
            return ((),) * len(scheduled), ()
        logits = self._model.logits(hidden.index_select(0, logit_rows))
        drawn = iter(self._sampler.draw(logits, self._draws(sampling)))

        failed: list[SeqId] = []
        samples_of: dict[SeqId, tuple[Sample, ...]] = {}
        for entry in sampling:
            samples = [next(drawn) for _ in entry.sample_for]
            whole = tuple(sample for sample in samples if sample is not None)
            if len(whole) < len(samples):
                failed.append(entry.seq_id)
                continue
            samples_of[entry.seq_id] = whole
        self._append(sampling, samples_of)
        return tuple(samples_of.get(entry.seq_id, ()) for entry in scheduled), tuple(failed)

    def _score(
        self, scheduled: Sequence[ScheduledSequence], hidden: torch.Tensor
    ) -> tuple[Samples, tuple[SeqId, ...]]:
        """Log-probabilities of the prompt tokens that follow new ones, where they are wanted."""
        failed: list[SeqId] = []
        scored: list[tuple[Sample, ...]] = []
        end_row = 0
        for entry in scheduled:
            first_row, end_row = end_row, end_row + entry.num_new_tokens
            end = min(entry.start + entry.num_new_tokens, self._num_prompt_tokens[entry.seq_id] - 1)
            if entry.prompt_logprobs is None or end <= entry.start:
                scored.append(())
                continue
            next_ids = self._builder.tokens(entry.seq_id, entry.start + 1, end + 1)
            samples: list[Sample | None] = []
            for first in range(0, len(next_ids), SCORED_ROWS):
                ids = next_ids[first : first + SCORED_ROWS]
                rows = hidden[first_row + first : first_row + first + len(ids)]
                samples += self._sampler.score(self._model.logits(rows), ids, entry.prompt_logprobs)
            whole = tuple(sample for sample in samples if sample is not None)
            if len(whole) < len(samples):
                failed.append(entry.seq_id)
            scored.append(whole if len(whole) == len(samples) else ())
        return tuple(scored), tuple(failed)

    def _draws(self, sampling: Sequence[ScheduledSequence]) -> Draws:
        row_of = self._builder.row_of
        counts = np.fromiter((len(entry.sample_for) for entry in sampling), np.int64, len(sampling))
        rows = np.fromiter((row_of(entry.seq_id) for entry in sampling), np.int64, len(sampling))
        ends = np.fromiter(
            (entry.start + entry.num_new_tokens for entry in sampling), np.int32, len(sampling)
        )
        return Draws(
            rows=np.repeat(rows, counts),
            logit_rows=np.repeat(np.arange(len(sampling)), counts),
            output_indices=np.array(
                [index for entry in sampling for index in entry.sample_for], dtype=np.int32
            ),
            positions=np.repeat(ends, counts),
        )

    def _append(
        self,
        sampling: Sequence[ScheduledSequence],
        samples_of: dict[SeqId, tuple[Sample, ...]],
    ) -> None:
        rows, token_ids = [], []
        for entry in sampling:
            samples = samples_of.get(entry.seq_id)
            own = entry.sample_for.index(self._output_index[entry.seq_id])
            # A failed row goes on with any token: the next plan may name it already.
            token_id = 0 if samples is None else samples[own].token_id
            row = self._builder.row_of(entry.seq_id)
            rows.append(row)
            token_ids.append(token_id)
            self._sampler.append(row, token_id)
        self._builder.append(np.array(rows, dtype=np.int64), np.array(token_ids, dtype=np.int32))
