"""From orders in token ids to streams of text: what every dialect's routes share.

    Order --> client.submit --> detokenizer --> stop strings --> TextDelta ..., Done

Decides when text ends an output. What it gives depends on the tokens alone: how the engine groups
them into steps never shows in texts, tokens, usage or endings. Knows no HTTP and no wire format.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

from kvpaging.base.errors import BadRequest, EngineDied, KvPagingError, Overloaded
from kvpaging.base.ids import RequestId
from kvpaging.cache.explanation import CacheExplanation
from kvpaging.cache.retention import AS_IT_IS, Retention
from kvpaging.scheduling.outputs import Finished, FinishReason, Recomputed, SequenceOutput
from kvpaging.scheduling.plan import Sample
from kvpaging.scheduling.request import Request, SamplingParams
from server.client import EngineClient
from server.observe.metrics import Metrics
from server.observe.record import RequestRecord
from server.tenants import Owner
from server.text import Detokenizer, Text
from server.text.stop import StopStrings

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One prompt to complete, `n` times."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """The text ends with the stop string instead of before it."""
    n: int = 1
    priority: int = 0
    owner: Owner = field(default_factory=Owner)
    retention: Retention = AS_IT_IS
    explain: bool = False
    is_score: bool = False
    """Only the prompt is of interest: the outputs are empty. (The engine samples a token anyway.)
    """

    def request(self) -> Request:
        """Give what the engine needs to know of it."""
        return Request(
            self.request_id,
            self.prompt_token_ids,
            self.sampling,
            self.n,
            self.priority,
            self.owner.namespace,
            self.owner.shared,
            self.owner.tenant,
            self.owner.max_pages,
            self.retention,
            explain=self.explain,
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, and the text that became certain with it (maybe none, maybe earlier tokens')."""

    sample: Sample
    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """How one output ended.

    `stop_reason` is the stop string or the token id that ended it. Its text is not part of the
    output's text; the tokens up to the one that completed it are part of the output's tokens, and
    are counted.
    """

    reason: FinishReason
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new of one output; `finish` with its last one."""

    index: int
    pieces: tuple[Piece, ...]
    text: str
    """The pieces' texts joined and, at the end, what had been held back."""
    finish: Finish | None = None
    prompt_samples: tuple[Sample, ...] = ()
    """With an output's first delta, where they were asked for: see `SequenceOutput`."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of all prompts and outputs of one call; a prompt counts once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class CallTimings:
    """Where the time went: the largest of each over all outputs.

    `queue_ms`, `prefill_ms` and `decode_ms` are the engine's; `ttft_ms` is this process's, from the
    arrival of the HTTP request to the first token.
    """

    queue_ms: float
    ttft_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class PromptExplanation:
    """What was found of one prompt, and what preemptions cost each of its outputs."""

    found: CacheExplanation
    recomputed: tuple[tuple[int, Recomputed], ...]
    """(output of this prompt, what it computed again)."""


@dataclass(frozen=True, slots=True)
class Done:
    """The last thing of a call: each output has ended."""

    usage: Usage
    timings: CallTimings
    explanations: tuple[PromptExplanation, ...] = ()
    """One for each order that asked for it, in their order."""


@dataclass(frozen=True, slots=True)
class Completed:
    """One whole output."""

    index: int
    text: str
    pieces: tuple[Piece, ...]
    finish: Finish
    prompt_samples: tuple[Sample, ...] = ()


async def collect(
    news: AsyncGenerator[TextDelta | Done, None],
) -> tuple[list[Completed], Done]:
    """Give the whole outputs, in order, once all have ended."""
    deltas: dict[int, list[TextDelta]] = {}
    done: Done | None = None
    async with aclosing(news):
        async for item in news:
            if isinstance(item, Done):
                done = item
            else:
                deltas.setdefault(item.index, []).append(item)
    if done is None:
        raise EngineDied("the engine ended the request before its outputs were complete")
    return [_joined(deltas[index]) for index in sorted(deltas)], done


def _joined(deltas: Sequence[TextDelta]) -> Completed:
    last = deltas[-1]
    return Completed(
        last.index,
        "".join([delta.text for delta in deltas]),
        tuple(piece for delta in deltas for piece in delta.pieces),
        last.finish or Finish(FinishReason.ABORT),
        deltas[0].prompt_samples,
    )


async def generate(
    client: EngineClient,
    text: Text,
    orders: Sequence[Order],
    *,
    metrics: Metrics,
    record: RequestRecord,
) -> AsyncGenerator[TextDelta | Done, None]:
    """Complete all orders at once; output `k` of order `i` has the index `i * n + k`.

    Closing it early aborts all of them, and so does the failure of one. Raises what
    `EngineClient.submit` raises.
    """
    runs: list[_Run] = []
    for order in orders:
        runs.append(_Run(client, text, order, sum(run.order.n for run in runs), metrics, record))
    try:
        async with aclosing(merge([run.deltas() for run in runs])) as deltas:
            async for delta in deltas:
                yield delta
        done = Done(_usage(runs), _timings(runs, record), _explanations(runs))
        metrics.e2e_latency.observe(time.monotonic() - record.started)
        record.queue_ms = done.timings.queue_ms
        yield done
    finally:
        usage = _usage(runs)
        record.prompt_tokens = usage.prompt_tokens
        record.completion_tokens = usage.completion_tokens
        record.cached_tokens = usage.cached_tokens
        record.finish_reasons = tuple(reason for run in runs for reason in run.finish_reasons)


class _Run:
    """One order while the engine works on it."""

    def __init__(
        self,
        client: EngineClient,
        text: Text,
        order: Order,
        first_index: int,
        metrics: Metrics,
        record: RequestRecord,
    ):
        self.order = order
        self.num_cached_tokens = 0
        self.outputs = [
            _Output(
                first_index + k,
                text.detokenizer(),
                StopStrings(order.stop, include=order.include_stop),
                order.sampling.min_new_tokens,
                is_score=order.is_score,
            )
            for k in range(order.n)
        ]
        self._client = client
        self._metrics = metrics
        self._record = record
        self._has_begun = False
        self._prompt_samples: list[Sample] = []

    @property
    def finish_reasons(self) -> list[str]:
        """Of each output that ended."""
        return [str(output.finish.reason) for output in self.outputs if output.finish]

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """Give what the engine computes as text; the outputs count themselves at their end."""
        ending: FinishReason | None = FinishReason.ABORT  # also when nobody takes it any more
        submitted = cast(
            "AsyncGenerator[SequenceOutput, None]", self._client.submit(self.order.request())
        )
        try:
            async with aclosing(submitted) as news:
                async for new in news:
                    delta = self._take(new)
                    if delta is not None:
                        yield delta
            if not all(output.finish for output in self.outputs):
                raise EngineDied("the engine ended the request before its outputs were complete")
        except (BadRequest, Overloaded):
            ending = None  # it was refused: it never was a request of the engine's
            raise
        except KvPagingError:
            ending = FinishReason.ERROR
            raise
        finally:
            if ending is not None:
                for output in self.outputs:
                    self._metrics.finished(str(output.finish.reason if output.finish else ending))

    def _take(self, new: SequenceOutput) -> TextDelta | None:
        self._prompt_samples += new.prompt_samples
        output = self.outputs[new.output_index]
        if new.finished is not None:
            output.engine_end = new.finished
            if new.output_index == 0:
                self._metrics.queue_time.observe(new.finished.timings.queue_s)
        if output.finish is not None:
            return None  # what the engine computed before it heard that text ended the output
        if new.finished is not None and new.finished.reason is FinishReason.ERROR:
            raise EngineDied(new.finished.message or "the engine failed this request")
        self._observe_tokens(output, new)
        delta = output.take(new)
        self._metrics.generation_tokens.inc(len(delta.pieces))
        if delta.finish is not None and new.finished is None:
            self._client.finish(self.order.request_id, new.output_index, output.num_tokens)
        if not (delta.pieces or delta.text or delta.finish):
            return None
        if output.has_begun:
            return delta
        output.has_begun = True
        # The prompt was whole before any output's first token: each output can have all of it.
        return replace(delta, prompt_samples=tuple(self._prompt_samples))

    def _observe_tokens(self, output: _Output, new: SequenceOutput) -> None:
        if not new.samples:
            return
        now = time.monotonic()
        if not self._has_begun:
            self._has_begun = True
            self.num_cached_tokens = new.num_cached_tokens
            self._metrics.prompt_tokens.inc(len(self.order.prompt_token_ids))
        if self._record.ttft_ms is None:
            self._record.ttft_ms = round((now - self._record.started) * 1000, 3)
            self._metrics.time_to_first_token.observe(now - self._record.started)
        if output.last_token_at is not None:
            interval = (now - output.last_token_at) / len(new.samples)
            for _ in new.samples:
                self._metrics.inter_token_latency.observe(interval)
        output.last_token_at = now


class _Output:
    """One output: its tokens become text, and text may end it."""

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        stops: StopStrings,
        min_new_tokens: int,
        *,
        is_score: bool = False,
    ):
        self.index = index
        self.num_tokens = 0
        self.has_begun = False
        """Something of it was given away."""
        self.finish: Finish | None = None
        self.engine_end: Finished | None = None
        self.last_token_at: float | None = None
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_new_tokens = min_new_tokens
        self._is_score = is_score

    def take(self, new: SequenceOutput) -> TextDelta:
        """Take the new tokens, one by one, up to the one that completes a stop string."""
        if self._is_score:
            return self._score(new.finished)
        pieces: list[Piece] = []
        end = new.finished
        for position, sample in enumerate(new.samples, 1):
            self.num_tokens += 1
            is_stop_token = (
                end is not None and end.stop_token_id is not None and position == len(new.samples)
            )
            text = "" if is_stop_token else self._detokenizer.push(sample.token_id)
            text, stop = self._stops.feed(text, armed=self.num_tokens >= self._min_new_tokens)
            pieces.append(Piece(sample, text))
            if stop is not None:
                return self._end(pieces, "", Finish(FinishReason.STOP, stop))
        if end is None:
            return self._delta(pieces)
        tail, stop = self._stops.feed(self._detokenizer.flush())
        if stop is not None:
            return self._end(pieces, tail, Finish(FinishReason.STOP, stop))
        return self._end(pieces, tail + self._stops.flush(), Finish(end.reason, end.stop_token_id))

    def _score(self, end: Finished | None) -> TextDelta:
        """Drop the token: no length is all of the length that was asked for."""
        if end is None:
            return self._delta()
        was_aborted = end.reason is FinishReason.ABORT
        return self._end([], "", Finish(end.reason if was_aborted else FinishReason.LENGTH))

    def _end(self, pieces: list[Piece], tail: str, finish: Finish) -> TextDelta:
        self.finish = finish
        return self._delta(pieces, tail)

    def _delta(self, pieces: Sequence[Piece] = (), tail: str = "") -> TextDelta:
        text = "".join([piece.text for piece in pieces]) + tail
        return TextDelta(self.index, tuple(pieces), text, self.finish)


@dataclass(frozen=True, slots=True)
class _SourceEnd:
    """One of the merged sources has no more to give, or failed."""

    error: Exception | None


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Give what the sources give, as it comes. The failure of one closes all and is raised."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for item in source:
                yield item
        return
    queue: asyncio.Queue[T | _SourceEnd] = asyncio.Queue(maxsize=len(sources))
    pumps = [asyncio.ensure_future(_pump(source, queue)) for source in sources]
    try:
        num_open = len(sources)
        while num_open:
            taken = await queue.get()
            if not isinstance(taken, _SourceEnd):
                yield taken
            elif taken.error is not None:
                raise taken.error
            else:
                num_open -= 1
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(source: AsyncGenerator[T, None], queue: asyncio.Queue[T | _SourceEnd]) -> None:
    try:
        async with aclosing(source):
            async for item in source:
                await queue.put(item)
    except Exception as error:  # noqa: BLE001 (handed on: `merge` raises it)
        await queue.put(_SourceEnd(error))
    else:
        await queue.put(_SourceEnd(None))


def _usage(runs: Sequence[_Run]) -> Usage:
    return Usage(
        sum(len(run.order.prompt_token_ids) for run in runs),
        sum(output.num_tokens for run in runs for output in run.outputs),
        sum(run.num_cached_tokens for run in runs),
    )


def _explanations(runs: Sequence[_Run]) -> tuple[PromptExplanation, ...]:
    found = []
    for run in runs:
        ends = [output.engine_end for output in run.outputs]
        told = next((end.explanation for end in ends if end and end.explanation), None)
        if told is not None:
            recomputed = [(k, one) for k, end in enumerate(ends) if end for one in end.recomputed]
            found.append(PromptExplanation(told, tuple(recomputed)))
    return tuple(found)


def _timings(runs: Sequence[_Run], record: RequestRecord) -> CallTimings:
    ends = [output.engine_end for run in runs for output in run.outputs if output.engine_end]
    return CallTimings(
        queue_ms=_ms(max(end.timings.queue_s for end in ends)),
        ttft_ms=record.ttft_ms or 0.0,
        prefill_ms=_ms(max(end.timings.prefill_s for end in ends)),
        decode_ms=_ms(max(end.timings.decode_s for end in ends)),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
