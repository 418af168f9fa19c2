"""Drives an executor with hand-made plans: several sequences, chunked prefill, shuffled pages."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from kvpaging.base.ids import PageId, SeqId, StepId
from kvpaging.execution.executor import Executor
from kvpaging.execution.models.layers import CausalLM
from kvpaging.scheduling.plan import (
    AddedSequence,
    PageCopy,
    Sample,
    ScheduledSequence,
    StepPlan,
    StepResult,
)
from kvpaging.scheduling.request import SamplingParams

GREEDY = SamplingParams(max_new_tokens=1_000, seed=0, temperature=0.0)


class RecordingModel:
    """A model that also keeps the logits of each step."""

    def __init__(self, model: CausalLM) -> None:
        self.config = model.config
        self.forward = model.forward
        self.steps: list[torch.Tensor] = []
        self._model = model

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._model.logits(hidden)
        self.steps.append(logits.clone())
        return logits


@dataclass
class Track:
    """One sequence as the driver knows it."""

    seq_id: SeqId
    prompt: list[int]
    sampling: SamplingParams
    output_index: int = 0
    output: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    pages: list[PageId] = field(default_factory=list)
    num_computed: int = 0
    is_added: bool = False

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class PlanDriver:
    """A scheduler without policy: every sequence goes on in every step."""

    def __init__(
        self,
        executor: Executor,
        *,
        page_size: int,
        num_pages: int,
        recording: RecordingModel | None = None,
        seed: int = 0,
    ) -> None:
        self._executor = executor
        self._page_size = page_size
        self._recording = recording
        self._free = [PageId(page_id) for page_id in range(1, num_pages + 1)]
        random.Random(seed).shuffle(self._free)
        self._next_seq_id = 0
        self._step_id = 0
        self._removed: list[SeqId] = []
        self._copies: list[PageCopy] = []

    def track(
        self, prompt: list[int], sampling: SamplingParams = GREEDY, output_index: int = 0
    ) -> Track:
        """A new sequence; it is added to the executor when it is first stepped."""
        self._next_seq_id += 1
        return Track(SeqId(self._next_seq_id), prompt, sampling, output_index)

    def take_pages(self, count: int) -> list[PageId]:
        """Pages that nobody else gets."""
        return [self._free.pop() for _ in range(count)]

    def copy(self, source: PageId, target: PageId) -> None:
        """Copy a page in the next step."""
        self._copies.append(PageCopy(source, target))

    def drop(self, track: Track) -> None:
        """Remove a sequence with the next step; stepping it again adds it anew and recomputes."""
        self._removed.append(track.seq_id)
        self._free.extend(reversed(track.pages))
        track.pages = []
        track.num_computed = 0
        track.is_added = False

    def step(
        self, work: list[tuple[Track, int]], sample_for: dict[SeqId, tuple[int, ...]] | None = None
    ) -> StepResult:
        """Compute at most so many tokens of each sequence; sample where all of it is computed."""
        added, scheduled = [], []
        for track, limit in work:
            known = len(track.tokens)
            num_new = min(limit, known - track.num_computed)
            end = track.num_computed + num_new
            need = -(-end // self._page_size) - len(track.pages)
            new_pages = self.take_pages(max(0, need))
            track.pages += new_pages
            if not track.is_added:
                added.append(
                    AddedSequence(
                        track.seq_id,
                        tuple(track.tokens),
                        len(track.prompt),
                        tuple(track.pages),
                        track.sampling,
                        track.output_index,
                    )
                )
                new_pages = []
            indices = (sample_for or {}).get(track.seq_id, (track.output_index,))
            scheduled.append(
                ScheduledSequence(
                    track.seq_id,
                    track.num_computed,
                    num_new,
                    tuple(new_pages),
                    indices if end == known else (),
                    track.sampling.prompt_logprobs,
                )
            )
            track.is_added = True
            track.num_computed = end
        self._step_id += 1
        plan = StepPlan(
            StepId(self._step_id),
            tuple(self._removed),
            tuple(added),
            tuple(self._copies),
            tuple(scheduled),
        )
        self._removed, self._copies = [], []
        result = self._executor.submit(plan).result()
        assert result.step_id == plan.step_id
        self._collect([track for track, _ in work], plan, result)
        return result

    def _collect(self, tracks: list[Track], plan: StepPlan, result: StepResult) -> None:
        assert len(result.samples) == len(plan.scheduled)
        row = 0
        for track, entry, samples in zip(tracks, plan.scheduled, result.samples, strict=True):
            if not entry.sample_for:
                assert samples == ()
                continue
            if track.seq_id not in result.failed:
                assert len(samples) == len(entry.sample_for)
                sample = samples[entry.sample_for.index(track.output_index)]
                track.output.append(sample.token_id)
                track.samples.append(sample)
            if self._recording is not None:
                track.logits.append(self._recording.steps[-1][row])
                row += 1

    def finish(self, tracks: list[Track], num_tokens: int, *, chunk: int = 1_000) -> None:
        """Step until each has `num_tokens` of output; sequence i joins in step i."""
        for step in range(100_000):
            work = [
                (track, chunk)
                for index, track in enumerate(tracks)
                if index <= step and len(track.output) < num_tokens
            ]
            if not work and step >= len(tracks):
                return
            self.step(work)
