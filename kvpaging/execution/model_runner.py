"""Runs the model for one step: rows to tensors, hidden states, logits, samples.

Keeps a row for each sequence between steps and appends to it what it samples, on the device: the
next step can begin before the host has seen it. Never sees a queue; which sequence runs was decided
by the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch

from kernels.ops import Ops
from kvpaging.base.ids import SeqId
from kvpaging.execution.batch_builder import BatchBuilder
from kvpaging.execution.decode_graphs import PADDED, Capture, DecodeGraphs, Sizes
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.models.layers import CausalLM
from kvpaging.execution.sampler import Drawn, Draws, Sampler, Scores
from kvpaging.execution.transfer import HostCopy, to_device
from kvpaging.scheduling.plan import AddedSequence, Sample, ScheduledSequence

Samples = tuple[tuple[Sample, ...], ...]

SCORED_ROWS: Final = 64
"""Prompt tokens whose logits are held at once: a long chunk's would fill the memory."""


class StepSamples(NamedTuple):
    """What a step has to say; see `StepResult` for each."""

    samples: Samples
    failed: tuple[SeqId, ...] = ()
    prompt_logprobs: Samples = ()


@dataclass(frozen=True, slots=True)
class _ScoredChunk:
    """The prompt tokens of one entry that follow its new ones, some rows at a time."""

    index: int
    """Which of the scheduled."""
    parts: tuple[Scores, ...]


class RunningSamples:
    """A step on the device, and the host's copy of what it samples under way."""

    def __init__(
        self,
        scheduled: Sequence[ScheduledSequence],
        drawn: Drawn | None,
        scored: Sequence[_ScoredChunk],
    ) -> None:
        self._scheduled = scheduled
        self._drawn = drawn
        self._scored = scored
        tensors = [] if drawn is None else list(drawn.tensors)
        tensors += [t for chunk in scored for part in chunk.parts for t in part.tensors]
        self._copy = HostCopy(tensors)

    def wait(self) -> StepSamples:
        """What was sampled, when it is there."""
        host = iter(self._copy.wait())
        failed: list[SeqId] = []
        samples: list[tuple[Sample, ...]] = [()] * len(self._scheduled)
        if self._drawn is not None:
            drawn = iter(self._drawn.samples([next(host) for _ in self._drawn.tensors]))
            for i, entry in enumerate(self._scheduled):
                samples[i] = _whole(entry, [next(drawn) for _ in entry.sample_for], failed)
        if all(entry.prompt_logprobs is None for entry in self._scheduled):
            return StepSamples(tuple(samples), tuple(failed))
        scores: list[tuple[Sample, ...]] = [()] * len(self._scheduled)
        for chunk in self._scored:
            found: list[Sample | None] = []
            for part in chunk.parts:
                found += part.samples([next(host) for _ in part.tensors])
            scores[chunk.index] = _whole(self._scheduled[chunk.index], found, failed)
        return StepSamples(tuple(samples), tuple(dict.fromkeys(failed)), tuple(scores))


def _whole(
    entry: ScheduledSequence, samples: Sequence[Sample | None], failed: list[SeqId]
) -> tuple[Sample, ...]:
    """All of the samples; none of them, and the sequence named, where one isn't finite."""
    whole = tuple(sample for sample in samples if sample is not None)
    if len(whole) == len(samples):
        return whole
    failed.append(entry.seq_id)
    return ()


def _is_decode(scheduled: Sequence[ScheduledSequence], graphs: DecodeGraphs) -> bool:
    """One token of each, and nothing but its logits wanted."""
    return graphs.fits(len(scheduled)) and all(
        entry.num_new_tokens == 1 and entry.sample_for and entry.prompt_logprobs is None
        for entry in scheduled
    )


class ModelRunner:
    """One model, its pool, and the rows of the sequences it works on."""

    def __init__(
        self,
        model: CausalLM,
        pool: KVPool,
        ops: Ops,
        eos_token_ids: Collection[int],
        capture: Capture | None = None,
        sizes: Sizes = PADDED,
    ) -> None:
        """With `capture` decode steps run from captured graphs of these sizes."""
        device = pool.pages.device
        self._model = model
        self._pool = pool
        self._graphs = None if capture is None else DecodeGraphs(model, pool, capture, sizes)
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

    def run(self, scheduled: Sequence[ScheduledSequence]) -> RunningSamples:
        """Compute the step's tokens and sample where the plan says so.

        Writes keys and values to the pool, and appends to each sampled row the token drawn for its
        own output index. A sequence whose logits aren't finite gets no samples and is named, and
        its row goes on with token 0: the next plan may name it already. Which logits are looked at
        is the plan's choice. Waits for nothing on the device.
        """
        batch = self._builder.build(scheduled)
        if self._graphs is not None and _is_decode(scheduled, self._graphs):
            hidden = self._graphs.hidden(batch)
        else:
            hidden = self._model.forward(batch, self._pool)
        drawn: Drawn | None = None
        sampling = [entry for entry in scheduled if entry.sample_for]
        if sampling:
            rows = hidden
            if len(sampling) != len(hidden):
                rows = hidden.index_select(0, batch.logit_rows)
            drawn = self._draw(sampling, self._model.logits(rows))
        return RunningSamples(scheduled, drawn, self._score(scheduled, hidden))

    def _draw(self, sampling: Sequence[ScheduledSequence], logits: torch.Tensor) -> Drawn:
        """Draw from `logits`, a row for each of `sampling`, and append to their rows."""
        draws = self._draws(sampling)
        drawn = self._sampler.draw(logits, draws)
        self._append(sampling, draws, drawn.tokens)
        return drawn

    def _score(
        self, scheduled: Sequence[ScheduledSequence], hidden: torch.Tensor
    ) -> list[_ScoredChunk]:
        """Log-probabilities of the prompt tokens that follow new ones, where they are wanted."""
        scored: list[_ScoredChunk] = []
        end_row = 0
        for index, entry in enumerate(scheduled):
            first_row, end_row = end_row, end_row + entry.num_new_tokens
            end = min(entry.start + entry.num_new_tokens, self._num_prompt_tokens[entry.seq_id] - 1)
            if entry.prompt_logprobs is None or end <= entry.start:
                continue
            next_ids = self._builder.tokens(entry.seq_id, entry.start + 1, end + 1)
            parts = []
            for first in range(0, len(next_ids), SCORED_ROWS):
                ids = next_ids[first : first + SCORED_ROWS]
                rows = hidden[first_row + first : first_row + first + len(ids)]
                logits = self._model.logits(rows)
                parts.append(self._sampler.score(logits, ids, entry.prompt_logprobs))
            scored.append(_ScoredChunk(index, tuple(parts)))
        return scored

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
        self, sampling: Sequence[ScheduledSequence], draws: Draws, tokens: torch.Tensor
    ) -> None:
        """Each row goes on with what was drawn for its own output index."""
        rows = draws.rows
        if len(rows) != len(sampling):
            own, first = [], 0
            for entry in sampling:
                own.append(first + entry.sample_for.index(self._output_index[entry.seq_id]))
                first += len(entry.sample_for)
            which = np.array(own, dtype=np.int64)
            rows, tokens = rows[which], tokens.index_select(0, to_device(which, tokens.device))
        self._builder.append(rows, tokens)
        self._sampler.append(rows, tokens)
