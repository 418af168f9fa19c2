"""One output in progress: the mutable side of a request.

The life of a sequence is a table; who moves it is the scheduler. Knows no queue and no tensor.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from kvpaging.base.errors import LawBroken
from kvpaging.base.ids import PageId, SeqId
from kvpaging.cache.explanation import CacheExplanation, Lookup
from kvpaging.cache.page_lease import PageLease
from kvpaging.cache.prefix_key import PrefixChain
from kvpaging.scheduling.outputs import Recomputed, Timings
from kvpaging.scheduling.request import Request

PRIORITY_S: Final = 30.0
"""A request of one priority more is served as if it had come so much earlier."""

Order = tuple[bool, float, int, int]


class SeqState(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()  # owns nothing; new, or forked and not yet placed
    LOADING = auto()  # owns pages that a lower level is filling
    RUNNING = auto()  # owns pages, may appear in a plan
    PREEMPTED = auto()  # owns nothing, waits; its tokens are kept
    FINISHED = auto()  # never moves again; owns pages only while a plan that reads them runs


MOVES: dict[SeqState, frozenset[SeqState]] = {
    SeqState.WAITING: frozenset({SeqState.LOADING, SeqState.RUNNING, SeqState.FINISHED}),
    SeqState.LOADING: frozenset({SeqState.WAITING, SeqState.FINISHED}),
    SeqState.RUNNING: frozenset({SeqState.PREEMPTED, SeqState.FINISHED}),
    SeqState.PREEMPTED: frozenset({SeqState.LOADING, SeqState.RUNNING, SeqState.FINISHED}),
    SeqState.FINISHED: frozenset(),
}


class Sequence:
    """Progress of one output.

        0 ......... num_computed ........ num_scheduled ........ num_tokens
        | applied   | in plans not yet applied | not yet planned |

    A token that a plan in flight will sample is counted by `num_pending` until it is applied.
    """

    __slots__ = (
        "arrival_s",
        "chain",
        "copy_from",
        "explanation",
        "first_scheduled_s",
        "first_token_s",
        "has_loaded",
        "has_row",
        "is_forked",
        "last_token_s",
        "lease",
        "lookup",
        "num_cached_tokens",
        "num_computed_before",
        "num_computed_tokens",
        "num_in_flight",
        "num_pending",
        "num_preemptions",
        "num_prompt_tokens",
        "num_recomputed_tokens",
        "num_scheduled_tokens",
        "num_scored_tokens",
        "order",
        "output_index",
        "recomputed",
        "request",
        "sample_self",
        "seq_id",
        "state",
        "token_ids",
        "was_admitted",
        "was_looked_ahead",
    )

    def __init__(
        self,
        seq_id: SeqId,
        request: Request,
        output_index: int,
        chain: PrefixChain,
        *,
        arrival_index: int,
        arrival_s: float,
    ):
        self.seq_id = seq_id
        self.request = request
        self.output_index = output_index
        self.chain = chain
        self.order = (
            request.is_idle,
            arrival_s - request.priority * PRIORITY_S,
            arrival_index,
            output_index,
        )
        """Smaller runs first. A priority is a start of so many seconds: it lets a request overtake,
        and nobody waits for ever. Within a priority: first come, first served."""
        self.state = SeqState.WAITING
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.num_pending = 0
        self.num_in_flight = 0
        """Plans made and not yet applied that name this sequence, and loads not yet answered."""
        self.lease: PageLease | None = None
        self.copy_from: PageId | None = None
        """Page to copy the tail page from before the next step (after a fork)."""
        self.has_row = False
        """The runner knows it."""
        self.has_loaded = False
        """Lower levels were asked, as the first in the queue, since it last owned nothing."""
        self.was_looked_ahead = False
        """They were asked for it before its turn."""
        self.is_forked = request.n == 1
        """The other outputs of its request exist."""
        self.sample_self = (output_index,)
        self.was_admitted = False
        self.num_cached_tokens = 0
        self.num_computed_before = 0
        """High-water mark of computed tokens: below it, computing is computing again."""
        self.num_scored_tokens = 0
        """Prompt tokens whose next one's log-probability was sent; counted where it is wanted."""
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.lookup: Lookup | None = None
        """What lower levels were asked and gave, once they were, until it is first placed."""
        self.explanation: CacheExplanation | None = None
        self.recomputed: tuple[Recomputed, ...] = ()
        """Both only where the request asks for them."""
        self.arrival_s = arrival_s
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s = arrival_s

    @property
    def num_tokens(self) -> int:
        """Tokens known."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_scores(self) -> bool:
        """Log-probabilities of prompt tokens are still to be sent. The last token has no next."""
        return (
            self.request.sampling.prompt_logprobs is not None
            and self.output_index == 0
            and self.num_scored_tokens < self.num_prompt_tokens - 1
        )

    @property
    def num_findable_tokens(self) -> int:
        """Pages may be found for what comes before the last of so many tokens.

        What is still to be scored must be computed: a page holds no logits.
        """
        return self.num_scored_tokens + 1 if self.wants_scores else len(self.token_ids)

    def move(self, new: SeqState) -> None:
        """Change state along the table; anything else is our bug."""
        if new not in MOVES[self.state]:
            raise LawBroken(f"sequence {self.seq_id}: illegal move {self.state} -> {new}")
        self.state = new

    def fork(self, seq_id: SeqId, output_index: int) -> Sequence:
        """Another output of the same request, at the end of the prompt; owns nothing yet."""
        twin = Sequence(
            seq_id,
            self.request,
            output_index,
            self.chain.fork(self.num_prompt_tokens),
            arrival_index=self.order[2],
            arrival_s=self.arrival_s,
        )
        twin.is_forked = True
        twin.was_admitted = True
        twin.num_cached_tokens = self.num_cached_tokens
        twin.explanation = self.explanation
        twin.first_scheduled_s = self.first_scheduled_s
        return twin

    def timings(self) -> Timings:
        """Intervals so far."""
        scheduled = self.last_token_s if self.first_scheduled_s is None else self.first_scheduled_s
        first = scheduled if self.first_token_s is None else self.first_token_s
        return Timings(
            queue_s=scheduled - self.arrival_s,
            prefill_s=first - scheduled,
            decode_s=max(0.0, self.last_token_s - first),
        )
