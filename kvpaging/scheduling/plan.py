"""The two values that cross between policy and work, and nothing else does.

    plan = scheduler.schedule(events)        # policy: reserves pages, marks tokens in flight
    result = executor.submit(plan).result()  # work: tensors, no queues
    outputs = scheduler.apply(plan, result)  # commits: tokens, keys, states, releases

The scheduler never sees a tensor; the model runner never sees a queue. A plan carries changes, not
whole tables: the runner keeps a row for each sequence from `added` until `removed`.
"""

from __future__ import annotations

import msgspec

from kvpaging.base.ids import PageId, SeqId, StepId
from kvpaging.cache.lower_levels import LevelFlush, PageLoad, PageStore, PageTouch
from kvpaging.scheduling.request import SamplingParams


class AddedSequence(msgspec.Struct, frozen=True, gc=False):
    """A sequence that the runner has no row for: everything it must know once."""

    seq_id: SeqId
    token_ids: tuple[int, ...]
    """All tokens known so far: the prompt and, after a preemption or a fork, sampled ones."""
    num_prompt_tokens: int
    page_ids: tuple[PageId, ...]
    """Its page table so far; pages taken in this step included."""
    sampling: SamplingParams
    output_index: int


class ScheduledSequence(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """This step's work for one sequence: `num_new_tokens` tokens from position `start`.

        0 ........ start ............ start + num_new_tokens ....... known tokens
        | computed | computed by this step | later steps (only if `sample_for` is empty)

    `sample_for` holds the output indices to sample from the last new token's logits: empty for a
    chunk that is not the last, the sequence's own index, or all of 0..n-1 where a request forks.
    """

    seq_id: SeqId
    start: int
    num_new_tokens: int
    new_page_ids: tuple[PageId, ...]
    """Appended to its page table before the step; empty for a sequence in `added`."""
    sample_for: tuple[int, ...]
    prompt_logprobs: int | None = None
    """k: the log-probability of each prompt token that follows a new one, and the k largest."""


class PageCopy(msgspec.Struct, frozen=True, gc=False):
    """Copy one whole page within the pool, before anything of the step is computed."""

    source: PageId
    target: PageId


class StepPlan(msgspec.Struct, frozen=True, gc=False):
    """One step's work, in this order: `removed`, `added`, `stores`, `loads`, `copies`, `scheduled`.

    `flushes` come before all of these, and end with a `LevelsFlushed` event.
    `touches` are told to the levels after `stores`, and may be answered by `PagesLost` events.
    `stores` read their pages before anything is written; `loads` only begin here, and end with a
    `PagesLoaded` event before some later plan.

    The tokens of a row that decodes are those that the runner sampled for it itself in the step
    before; it appends what it samples for `sequence.output_index` to the row.
    """

    step_id: StepId
    removed: tuple[SeqId, ...]
    """Rows that the runner drops: finished, aborted or preempted sequences."""
    added: tuple[AddedSequence, ...]
    copies: tuple[PageCopy, ...]
    scheduled: tuple[ScheduledSequence, ...]
    stores: tuple[PageStore, ...] = ()
    loads: tuple[PageLoad, ...] = ()
    flushes: tuple[LevelFlush, ...] = ()
    touches: tuple[PageTouch, ...] = ()

    @property
    def num_new_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(s.num_new_tokens for s in self.scheduled)


class Sample(msgspec.Struct, frozen=True, gc=False):
    """One token; `logprob` and `top` where the request asked for log-probabilities."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most probable first."""


class StepResult(msgspec.Struct, frozen=True, gc=False):
    """What a step sampled: for each entry of `plan.scheduled` one sample per `sample_for`.

    `failed` names sequences whose logits were not finite; they have no samples. Their request ends
    with an error and the others go on.
    """

    step_id: StepId
    samples: tuple[tuple[Sample, ...], ...]
    failed: tuple[SeqId, ...] = ()
    elapsed_s: float = 0.0
    """What the work took."""
    prompt_logprobs: tuple[tuple[Sample, ...], ...] = ()
    """For each entry of `plan.scheduled`, or empty where none asks: one sample for each of its new
    tokens that a prompt token follows, of that next token. Nothing for a failed one."""
