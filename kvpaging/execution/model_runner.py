"""Runs the model for one step: rows to tensors, hidden states, logits, samples.

Keeps a row for each sequence between steps and appends to it what it samples. Never sees a queue;
which sequence runs was decided by the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from kernels.ops import Ops
from kvpaging.base.ids import SeqId
from kvpaging.execution.batch_builder import BatchBuilder
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.models.layers import CausalLM
from kvpaging.execution.sampler import Draws, Sampler
from kvpaging.scheduling.plan import AddedSequence, Sample, ScheduledSequence

StepSamples = tuple[tuple[tuple[Sample, ...], ...], tuple[SeqId, ...]]
"""For each scheduled sequence its samples, and the sequences that failed."""


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

    def add(self, sequence: AddedSequence) -> None:
        """Give a sequence a row."""
        row = self._builder.add(sequence)
        self._sampler.add(row, sequence)
        self._output_index[sequence.seq_id] = sequence.output_index

    def remove(self, seq_id: SeqId) -> None:
        """Drop a sequence's row."""
        self._sampler.remove(self._builder.remove(seq_id))
        del self._output_index[seq_id]

    def run(self, scheduled: Sequence[ScheduledSequence]) -> StepSamples:
        """Compute the step's tokens and sample where the plan says so.

        Writes keys and values to the pool, and appends to each sampled row the token drawn for its
        own output index. A sequence whose logits aren't finite gets no samples and is named.
        """
        batch = self._builder.build(scheduled)
        hidden = self._model.forward(batch, self._pool)
        sampling = [entry for entry in scheduled if entry.sample_for]
        if not sampling:
            return ((),) * len(scheduled), ()
        logits = self._model.logits(hidden.index_select(0, batch.logit_rows))
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
            if samples is None:
                continue
            own = entry.sample_for.index(self._output_index[entry.seq_id])
            row, token_id = self._builder.row_of(entry.seq_id), samples[own].token_id
            rows.append(row)
            token_ids.append(token_id)
            self._sampler.append(row, token_id)
        self._builder.append(np.array(rows, dtype=np.int64), np.array(token_ids, dtype=np.int32))
