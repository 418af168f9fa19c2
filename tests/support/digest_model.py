"""An executor whose next token is a digest of what it reads through the page table.

Any paging mistake (wrong page, stale page, off-by-one slot, copy too late, write after release)
changes the tokens, so whole-engine tests run without torch. It keeps its own rows, as the real
runner does, and from the plan alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvpaging.base.config import EngineConfig, SchedulerConfig
from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import PageKey
from kvpaging.cache.lower_levels import Held, LevelLoad, LevelsFlushed, PageLoad, PagesLoaded
from kvpaging.cache.prefix_key import ChainLink
from kvpaging.levels.level import BelowStats
from kvpaging.scheduling.plan import (
    AddedSequence,
    Sample,
    ScheduledSequence,
    StepPlan,
    StepResult,
)

VOCAB = 97
GARBAGE = -7


def digest(tokens: Sequence[int], seed: int, output_index: int) -> int:
    """The next token after `tokens`; output 0 with seed 0 is the greedy one."""
    text = repr((list(tokens), seed, output_index)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little") % VOCAB


def score(tokens: Sequence[int], next_token: int, num_top: int) -> Sample:
    """A made-up log-probability of `next_token` after `tokens`."""
    top = tuple((digest(tokens, k, next_token), -float(k)) for k in range(num_top))
    return Sample(next_token, -float(digest(tokens, next_token, -1)), top)


def expected_scores(prompt: Sequence[int], num_top: int) -> list[Sample]:
    """What the digest model says of the prompt's tokens, without any paging."""
    return [score(prompt[:p], prompt[p], num_top) for p in range(1, len(prompt))]


def expected_tokens(
    prompt: Sequence[int], seed: int, output_index: int, count: int, stop: frozenset[int]
) -> list[int]:
    """What the digest model says alone, without any paging."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(digest(tokens, seed, output_index))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


@dataclass
class RunningDigest:
    executor: DigestExecutor
    plan: StepPlan

    def result(self) -> StepResult:
        return self.executor.run(self.plan)


@dataclass
class Row:
    tokens: list[int]
    pages: list[int]
    added: AddedSequence = field(repr=False)


class DigestExecutor:
    """Implements `kvpaging.execution.executor.Executor`; a step runs when its result is wanted."""

    def __init__(self, num_pages: int, page_size: int, levels: DigestLevels | None = None):
        self.page_size = page_size
        self.levels = levels
        self.slots = [GARBAGE] * ((num_pages + 1) * page_size)
        self.rows: dict[int, Row] = {}
        self.plans: list[StepPlan] = []
        self.failing: set[tuple[int, ...]] = set()
        """Prompts whose logits shall not be finite."""
        self.num_copies = 0
        self.num_chunks = 0

    def slot(self, row: Row, position: int) -> int:
        page_id = row.pages[position // self.page_size]
        assert page_id != 0, "the scratch page was handed out"
        return page_id * self.page_size + position % self.page_size

    def submit(self, plan: StepPlan) -> RunningDigest:
        return RunningDigest(self, plan)

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        if self.levels is not None:
            self.levels.carry_out(plan, self.slots, self.page_size)
        for seq_id in plan.removed:
            del self.rows[seq_id]
        for added in plan.added:
            assert added.seq_id not in self.rows
            self.rows[added.seq_id] = Row(list(added.token_ids), list(added.page_ids), added)
        targets = {copy.target for copy in plan.copies}
        assert not targets & {copy.source for copy in plan.copies}
        for copy in plan.copies:
            self.num_copies += 1
            size = self.page_size
            source = self.slots[copy.source * size : (copy.source + 1) * size]
            self.slots[copy.target * size : (copy.target + 1) * size] = source
        self._write(plan)
        samples, failed = [], []
        for entry in plan.scheduled:
            row = self.rows[entry.seq_id]
            end = entry.start + entry.num_new_tokens
            prompt = tuple(row.tokens[: row.added.num_prompt_tokens])
            if not entry.sample_for:
                if entry.prompt_logprobs is not None and prompt in self.failing:
                    failed.append(entry.seq_id)
                samples.append(())
                self.num_chunks += 1
                continue
            assert end == len(row.tokens)
            read = [self.slots[self.slot(row, p)] for p in range(end)]
            seed = row.added.sampling.seed
            chosen = tuple(Sample(digest(read, seed, i)) for i in entry.sample_for)
            own = entry.sample_for.index(row.added.output_index)
            row.tokens.append(chosen[own].token_id)
            if prompt in self.failing:
                failed.append(entry.seq_id)
                chosen = ()
            samples.append(chosen)
        scores = ()
        if any(entry.prompt_logprobs is not None for entry in plan.scheduled):
            scores = tuple(self._scores(entry) for entry in plan.scheduled)
        return StepResult(plan.step_id, tuple(samples), tuple(failed), prompt_logprobs=scores)

    def _scores(self, entry: ScheduledSequence) -> tuple[Sample, ...]:
        if entry.prompt_logprobs is None:
            return ()
        row = self.rows[entry.seq_id]
        end = min(entry.start + entry.num_new_tokens, row.added.num_prompt_tokens - 1)
        assert end > entry.start, "nothing to score"
        read = [self.slots[self.slot(row, p)] for p in range(end)]
        return tuple(
            score(read[: p + 1], row.tokens[p + 1], entry.prompt_logprobs)
            for p in range(entry.start, end)
        )

    def _write(self, plan: StepPlan) -> None:
        written: set[int] = set()
        for entry in plan.scheduled:
            row = self.rows[entry.seq_id]
            row.pages.extend(entry.new_page_ids)
            for position in range(entry.start, entry.start + entry.num_new_tokens):
                slot = self.slot(row, position)
                assert slot not in written, "two sequences write to one slot"
                written.add(slot)
                self.slots[slot] = row.tokens[position]

    @property
    def lower_levels(self) -> DigestLevels | None:
        return self.levels

    def below(self) -> BelowStats:
        return BelowStats()

    def completions(self) -> tuple[PagesLoaded | LevelsFlushed, ...]:
        return () if self.levels is None else self.levels.completions(self.slots, self.page_size)

    def wait(self, timeout_s: float) -> None:
        """Time is counted in calls here."""

    def close(self) -> None:
        self.rows.clear()


class DigestLevels:
    """Lower levels that are slow, forget, and deliver less than they promised."""

    names: tuple[str, ...] = ("digest",)

    def __init__(
        self,
        rng: random.Random,
        *,
        store_at_uses: tuple[int, ...] = (),
        wants_evicted: bool,
        forgets: bool = True,
    ):
        self.forgets = forgets
        self.store_at_uses = store_at_uses
        self.wants_evicted = wants_evicted
        self.pages: dict[bytes, tuple[bytes, list[int]]] = {}
        self.pending: list[tuple[int, PageLoad]] = []
        self.flushed: list[LevelsFlushed] = []
        self.gone: dict[str, dict[PageKey, Evicted]] = {}
        """What each level says of pages that left it."""
        self.num_loaded = 0
        self.num_missed = 0
        self._rng = rng

    def num_storable(self) -> int:
        return self._rng.choice([0, 0, 1, 2, 3]) if self.forgets else 99

    def probe(self, links: Sequence[ChainLink]) -> tuple[Held, ...]:
        found = 0
        for link in links:
            if link.key not in self.pages:
                break
            found += 1
        return (Held("digest", found),) if found else ()

    def evicted(self, keys: Sequence[PageKey]) -> dict[str, list[Evicted | None]]:
        return {n: [self.gone.get(n, {}).get(key) for key in keys] for n in self.names}

    other_roots: tuple[PageKey, ...] = ()

    def holder(self, key: PageKey) -> str | None:
        return "digest" if key in self.pages else None

    def carry_out(self, plan: StepPlan, slots: list[int], size: int) -> None:
        for store in plan.stores:
            content = slots[store.page_id * size : (store.page_id + 1) * size]
            packed = b"".join(token.to_bytes(4, "little") for token in content)
            assert store.num_uses in (*self.store_at_uses, 0)
            assert store.num_uses or self.wants_evicted
            assert packed == store.link.tokens, "a page was stored that does not hold its link"
            self.pages[store.link.key] = (store.link.tokens, content)
        for order in plan.flushes:
            assert order.levels == self.names
            self.flushed.append(LevelsFlushed(order.query_id, {"digest": len(self.pages)}))
            self.pages.clear()
        for load in plan.loads:
            for page_id in load.page_ids:
                slots[page_id * size : (page_id + 1) * size] = [GARBAGE] * size
            self.pending.append((self._rng.randint(0, 4), load))

    def completions(self, slots: list[int], size: int) -> tuple[PagesLoaded | LevelsFlushed, ...]:
        while self.forgets and self.pages and self._rng.random() < 0.2:
            del self.pages[self._rng.choice(list(self.pages))]
        due = [load for delay, load in self.pending if delay <= 0]
        self.pending = [(delay - 1, load) for delay, load in self.pending if delay > 0]
        flushed, self.flushed = self.flushed, []
        return (*flushed, *(self._complete(load, slots, size) for load in due))

    def _complete(self, load: PageLoad, slots: list[int], size: int) -> PagesLoaded:
        num_pages = 0
        for page_id, link in zip(load.page_ids, load.links, strict=True):
            stored = self.pages.get(link.key)
            if stored is None or stored[0] != link.tokens:
                break
            slots[page_id * size : (page_id + 1) * size] = stored[1]
            num_pages += 1
        self.num_loaded += num_pages
        self.num_missed += len(load.page_ids) - num_pages
        asked = LevelLoad("digest", len(load.page_ids), num_pages, 0.001)
        return PagesLoaded(load.seq_id, num_pages, 0.001, (asked,))


def digest_config(
    num_pages: int = 16,
    page_size: int = 4,
    *,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 64,
    max_num_waiting: int = 64,
    eos_token_ids: tuple[int, ...] = (0,),
    prefix_cache: bool = True,
    max_pinned_ratio: float = 0.0,
) -> EngineConfig:
    free_pages = max(0, num_pages - -(-max_model_len // page_size))
    return EngineConfig(
        model_dir="digest",
        architecture="Digest",
        device="cpu",
        dtype="float32",
        kv_cache_dtype="float32",
        threads=1,
        kernels="digest",
        exact=True,
        kv_cache_bytes=0,
        vocab_size=VOCAB,
        eos_token_ids=eos_token_ids,
        scheduler=SchedulerConfig(
            num_pages=num_pages,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_num_waiting=max_num_waiting,
            prefix_cache=prefix_cache,
            max_pinned_pages=min(free_pages, int(max_pinned_ratio * num_pages)),
        ),
    )
