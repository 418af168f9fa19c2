"""An `EngineClient` without an engine: scripted tokens, delays, groupings and failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle

from msgspec.structs import replace

from kvpaging.base.config import EngineConfig, SchedulerConfig
from kvpaging.base.errors import EngineDied, Overloaded
from kvpaging.base.evictions import EvictionCause
from kvpaging.base.ids import RequestId
from kvpaging.cache.explanation import (
    CacheExplanation,
    LevelMatch,
    LoadNote,
    MissedRun,
    MissReason,
)
from kvpaging.cache.load_costs import LevelCost, LoadChoices
from kvpaging.cache.pins import PinState
from kvpaging.cache.statistics import LoadTimes
from kvpaging.engine.connection import encode_frame
from kvpaging.engine.messages import CacheStats, EngineStats, PagePicture, PinList
from kvpaging.levels.level import BelowStats, LevelStats
from kvpaging.scheduling import admission
from kvpaging.scheduling.events import Arrival
from kvpaging.scheduling.outputs import (
    Finished,
    FinishReason,
    Flushed,
    Recomputed,
    SequenceOutput,
    Timings,
)
from kvpaging.scheduling.plan import Sample
from kvpaging.scheduling.request import Request
from server.client import EngineState, EngineStatus

Script = Callable[[Request, int, int], int]
"""(request, output index, position) -> token id."""


def echo(request: Request, output_index: int, position: int) -> int:
    """The prompt again and again."""
    return request.prompt_token_ids[position % len(request.prompt_token_ids)]


def script(*token_ids: int) -> Script:
    """These tokens, then the last one for ever."""
    return lambda request, index, position: token_ids[min(position, len(token_ids) - 1)]


def engine_config(
    *,
    vocab_size: int = 512,
    eos_token_ids: tuple[int, ...] = (0,),
    max_model_len: int = 256,
    num_pages: int = 64,
    page_size: int = 16,
    max_num_seqs: int = 8,
    max_pinned_pages: int = 16,
    model_dir: str = "",
) -> EngineConfig:
    return EngineConfig(
        model_dir=model_dir,
        architecture="FakeForCausalLM",
        device="cpu",
        dtype="float32",
        kv_cache_dtype="float32",
        threads=1,
        kernels="none",
        exact=True,
        kv_cache_bytes=0,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        scheduler=SchedulerConfig(
            num_pages=num_pages,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_pinned_pages=max_pinned_pages,
            max_num_batched_tokens=256,
            max_model_len=max_model_len,
            max_num_waiting=16,
        ),
    )


@dataclass
class FakeEngineClient:
    config: EngineConfig | None = field(default_factory=engine_config)
    script: Script = echo
    groups: tuple[int, ...] = (1,)
    """Tokens a step, over and over."""
    delay_s: float = 0.0
    """Before each step."""
    dies_after: int | None = None
    """Steps of a request, then `EngineDied`."""
    fails_after: int | None = None
    """Steps of a request, then its output ends with `ERROR`."""
    crashes_after: int | None = None
    """Steps of a request, then an exception that nobody expects."""
    is_full: bool = False
    state: EngineState = EngineState.READY
    stats: EngineStats = field(default_factory=EngineStats)
    cache: CacheStats = field(default_factory=lambda: cache_stats())
    num_restarts: int = 0
    num_cached_tokens: int = 0
    levels_that_fail: tuple[str, ...] = ()
    """To be emptied."""
    forgets_pins: bool = False
    """As if the cache had been emptied."""
    late_steps: int = 0
    """Steps that an output still makes after it was told to finish."""

    open: dict[RequestId, Request] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)
    aborted: list[RequestId] = field(default_factory=list)
    unpinned: list[RequestId] = field(default_factory=list)
    finishes: list[tuple[RequestId, int, int]] = field(default_factory=list)

    def status(self) -> EngineStatus:
        return EngineStatus(self.state, "as told", self.config, self.stats, self.num_restarts)

    async def submit(self, request: Request) -> AsyncGenerator[SequenceOutput, None]:
        if self.config is None or self.state is EngineState.DEAD:
            raise EngineDied("there is no engine")
        admission.check(request, self.config.scheduler, self.config.vocab_size)
        encode_frame(Arrival(request))  # as the real one does: what can't be sent is found here
        if self.is_full:
            raise Overloaded("16 requests are waiting, and the limit is 16", retry_after_s=2.4)
        self.open[request.request_id] = request
        self.seen.append(request)
        outputs = [_Output(self, request, index) for index in range(request.n)]
        try:
            for part in _prompt_samples(request):
                yield SequenceOutput(
                    request.request_id, 0, (), self.num_cached_tokens, prompt_samples=part
                )
            num_steps = 0
            while outputs:
                await asyncio.sleep(self.delay_s)
                if num_steps == self.dies_after:
                    raise EngineDied("the engine process ended (killed by SIGKILL)")
                if num_steps == self.crashes_after:
                    raise ZeroDivisionError("secret prompt text")
                for output in outputs:
                    yield output.step(fails=num_steps == self.fails_after)
                outputs = [output for output in outputs if not output.is_finished]
                num_steps += 1
        finally:
            del self.open[request.request_id]
            if outputs:
                self.aborted.append(request.request_id)

    def finish(self, request_id: RequestId, output_index: int, num_tokens: int) -> None:
        self.finishes.append((request_id, output_index, num_tokens))

    async def pages(self) -> PagePicture:
        return PagePicture(0, 16, ())

    async def cache_stats(self) -> CacheStats:
        if self.config is None or self.state is EngineState.DEAD:
            raise EngineDied("there is no engine")
        return self.cache

    async def pins(self, tenant: str | None = None, name: str | None = None) -> PinList:
        pins = tuple(
            PinState(request.request_id, request.tenant, num_pages, True, request.retention.ttl_s)
            for request in self.seen
            if request.retention.pin and request.request_id not in self.unpinned
            if tenant in (None, request.tenant) and name in (None, request.request_id)
            if (num_pages := len(request.prompt_token_ids) // 16) and not self.forgets_pins
        )
        return PinList(0, 16, 32, pins)

    def unpin(self, request_id: RequestId) -> None:
        self.unpinned.append(request_id)

    async def flush_cache(self, level: str | None) -> Flushed:
        failed = self.levels_that_fail
        pages: dict[str, int | None] = {"device": 5, "disk": 7, "remote": None}
        if level is not None:
            pages = {name: count for name, count in pages.items() if name == level}
        emptied = {name: count for name, count in pages.items() if name not in failed}
        return Flushed(1, emptied, tuple(name for name in pages if name in failed))

    async def close(self) -> None:
        self.state = EngineState.DEAD


def cache_stats() -> CacheStats:
    """Made up: 100 pages were asked for, 40 were on the device and 10 on the disk."""
    disk = LevelStats(
        num_pages=7,
        num_bytes=700,
        capacity_bytes=1000,
        loads=12,
        hits=10,
        stores=20,
        stored=15,
        known=5,
        evicted={"room": 8, "flush": 3},
        rescued=0,
        refused=1,
        late=2,
        corrupt=3,
        failures=4,
        stored_payload_bytes=1500,
        written_bytes=1000,
        loaded_payload_bytes=640,
        store_s=3.0,
        load_s=2.0,
    )
    return CacheStats(
        page_size=16,
        page_bytes=64,
        pages={"free": 1, "cached": 2, "held": 3, "quarantined": 0},
        queried_tokens=1700,
        hit_tokens=800,
        queried_pages=100,
        hit_pages={"device": 40, "disk": 10},
        missed_pages={"never_seen": 44, "evicted_room": 6},
        num_recomputed_tokens=5,
        evictions={"room": 6, "flush": 0},
        saved_s=1.25,
        load_times={"disk": LoadTimes([0, 2, *[0] * 13, 1], 9.0)},
        choices=LoadChoices(0.001, (LevelCost("disk", 0.004, 0.5, 0.1),), 3, 2),
        below=BelowStats({"disk": disk}, 128, 9),
    )


def explanation(num_tokens: int) -> CacheExplanation:
    """Made up: the first token was found, the second was evicted, the others are new."""
    return CacheExplanation(
        1,
        num_tokens,
        1,
        (
            LevelMatch("device", 0, 0, 0, (MissedRun(MissReason.NEVER_SEEN, 0, num_tokens),)),
            LevelMatch(
                "disk",
                1,
                0,
                1,
                (
                    MissedRun(MissReason.EVICTED, 1, 1, EvictionCause.ROOM, 2.5, "disk"),
                    MissedRun(MissReason.NEVER_SEEN, 2, num_tokens - 2),
                ),
            ),
        ),
        (
            MissedRun(MissReason.EVICTED, 1, 1, EvictionCause.ROOM, 2.5, "disk"),
            MissedRun(MissReason.NEVER_SEEN, 2, num_tokens - 2),
        ),
        LoadNote(1, 1, 1, 0.004),
    )


def _prompt_samples(request: Request) -> tuple[tuple[Sample, ...], ...]:
    """In two parts, as of a prompt that took two steps: position p has -p and -p - k."""
    num_top = request.sampling.prompt_logprobs
    if num_top is None:
        return ()
    samples = [
        Sample(token_id, -float(p), tuple((token_id + k, -float(p + k)) for k in range(num_top)))
        for p, token_id in enumerate(request.prompt_token_ids)
    ]
    return tuple(samples[1:3]), tuple(samples[3:])


class _Output:
    def __init__(self, client: FakeEngineClient, request: Request, index: int):
        self._client = client
        self._request = request
        self._index = index
        self._num_tokens = 0
        self._late_steps = client.late_steps
        self._groups: Iterator[int] = cycle(client.groups)
        self.is_finished = False

    @property
    def _is_told_to_finish(self) -> bool:
        return any(
            (request_id, index) == (self._request.request_id, self._index)
            for request_id, index, _ in self._client.finishes
        )

    def step(self, *, fails: bool) -> SequenceOutput:
        if fails:
            return self._give([], FinishReason.ERROR, None)
        if self._is_told_to_finish:
            if self._late_steps == 0:
                return self._give([], FinishReason.STOP, None)
            self._late_steps -= 1
        sampling, samples = self._request.sampling, []
        for _ in range(next(self._groups)):
            token_id = self._client.script(self._request, self._index, self._num_tokens)
            self._num_tokens += 1
            samples.append(self._sample(token_id))
            may_stop = self._num_tokens >= sampling.min_new_tokens
            if may_stop and self._is_stop(token_id):
                return self._give(samples, FinishReason.STOP, token_id)
            if self._num_tokens == sampling.max_new_tokens:
                return self._give(samples, FinishReason.LENGTH, None)
        return self._give(samples, None, None)

    def _is_stop(self, token_id: int) -> bool:
        sampling = self._request.sampling
        assert self._client.config is not None
        is_eos = token_id in self._client.config.eos_token_ids and not sampling.ignore_eos
        return is_eos or token_id in sampling.stop_token_ids

    def _sample(self, token_id: int) -> Sample:
        num_top = self._request.sampling.logprobs
        if num_top is None:
            return Sample(token_id)
        others = [(token_id + k, -0.5 - k) for k in range(num_top)]
        return Sample(token_id, -0.5, tuple(others))

    def _give(
        self, samples: list[Sample], reason: FinishReason | None, stop_token_id: int | None
    ) -> SequenceOutput:
        finished = None
        if reason is not None:
            self.is_finished = True
            message = "its logits were not finite" if reason is FinishReason.ERROR else None
            timings = Timings(0.001, 0.002, 0.003)
            finished = Finished(reason, stop_token_id, timings, 0, 0, message)
            if self._request.explain:
                explained = explanation(len(self._request.prompt_token_ids))
                again = (Recomputed(0, 2),) if self._index else ()
                finished = replace(finished, explanation=explained, recomputed=again)
        return SequenceOutput(
            self._request.request_id,
            self._index,
            tuple(samples),
            self._client.num_cached_tokens,
            finished,
        )
