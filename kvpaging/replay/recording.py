"""Recordings: what each step of a live engine was given, and a digest of what it decided.

JSONL. The first line is a `Header`; each other one a `RecordedStep`. No text and no token is in it:
a page is named by its key in a chain whose root is a random salt that is never written, so equal
names within a recording mean equal prefixes (of one tenant), and names of two recordings can't be
compared. Requests are numbered in order of arrival. Refused requests are left out, they change
nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, TypeVar

import msgspec

from kvpaging.base.config import SchedulerConfig
from kvpaging.base.errors import ConfigError
from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import PageKey, RequestId
from kvpaging.cache.lower_levels import Held, LevelsFlushed, LowerLevels, PagesLoaded, PagesLost
from kvpaging.cache.prefix_key import ChainLink, PrefixChain, root_key
from kvpaging.cache.retention import AS_IT_IS, Retention
from kvpaging.replay.trace import TraceRequest
from kvpaging.scheduling.events import Abort, Arrival, Event, Finish, Flush, Unpin
from kvpaging.scheduling.outputs import FinishReason, Rejection, SequenceOutput, StepOutputs
from kvpaging.scheduling.plan import StepPlan, StepResult
from kvpaging.scheduling.request import Request

VERSION: Final = 3
PAGE_NAME_BYTES: Final = 16

_logger: Final = logging.getLogger(__name__)

_T = TypeVar("_T")


class Header(msgspec.Struct, frozen=True):
    """What the engine ran with, as far as decisions depend on it."""

    kvpaging_recording: int
    """The format's version."""
    scheduler: SchedulerConfig
    store_at_uses: tuple[int, ...] | None = None
    """Of the levels below the device; `None` where there are none."""
    wants_evicted: bool = False
    level_names: tuple[str, ...] = ()


class RecordedArrival(msgspec.Struct, frozen=True, tag="arrival", omit_defaults=True):
    """A request that was let in."""

    request: int
    num_prompt_tokens: int
    pages: tuple[str, ...]
    """Names of the prompt's full pages."""
    max_new_tokens: int
    n: int = 1
    priority: int = 0
    prompt_logprobs: int | None = None
    retention: Retention = AS_IT_IS
    tenant: int = 0
    """Tenants are numbered as they come; 0 where neither a bound nor a pin asks whose it is."""
    tenant_pages: int | None = None
    is_idle: bool = False


class RecordedAbort(msgspec.Struct, frozen=True, tag="abort"):
    """Its client went away."""

    request: int


class RecordedUnpin(msgspec.Struct, frozen=True, tag="unpin"):
    """The pin that it made was given up."""

    request: int


class RecordedFinish(msgspec.Struct, frozen=True, tag="finish"):
    """Text ended one output."""

    request: int
    output_index: int
    num_tokens: int


class FilledPage(msgspec.Struct, frozen=True, array_like=True):
    """A generated token was the last of a page."""

    request: int
    output_index: int
    page_index: int
    page: str


class EndedOutput(msgspec.Struct, frozen=True, array_like=True):
    """An output ended of itself with so many tokens."""

    request: int
    output_index: int
    num_tokens: int


class RecordedFlush(msgspec.Struct, frozen=True, tag="flush"):
    """The operator emptied a level, or all (`None`); `LevelsFlushed` of the same query ends it."""

    query_id: int
    level: str | None


RecordedEvent = (
    RecordedArrival
    | RecordedAbort
    | RecordedUnpin
    | RecordedFinish
    | RecordedFlush
    | PagesLoaded
    | PagesLost
    | LevelsFlushed
)


class RecordedStep(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step was given, from above and from the device, and a digest of its plan."""

    step_id: int
    at_s: float
    """Since the engine began, on its clock."""
    decisions: str
    """`plan_digest` of the plan."""
    elapsed_s: float = 0.0
    """What the device took."""
    num_held: int = 0
    """Plans before it whose results were not yet known when it was made."""
    events: tuple[RecordedEvent, ...] = ()
    probes: tuple[tuple[Held, ...], ...] = ()
    """What the levels answered, in the order in which they were asked."""
    store_rooms: tuple[int, ...] = ()
    """Pages that they would take, likewise."""
    pages: tuple[FilledPage, ...] = ()
    stops: tuple[EndedOutput, ...] = ()
    """By a stop token."""
    other_ends: tuple[EndedOutput, ...] = ()
    """By length, text or abort. Follows from the rest; for those who read only lengths."""
    failures: tuple[EndedOutput, ...] = ()
    """Its logits were no numbers."""


def plan_digest(plan: StepPlan) -> str:
    """All decisions of a plan, page for page, in 16 hexadecimal digits; tokens are left out."""
    decisions = (
        plan.step_id,
        plan.removed,
        [(a.seq_id, len(a.token_ids), a.page_ids, a.output_index) for a in plan.added],
        plan.copies,
        plan.scheduled,
        [(store.page_id, store.num_uses) for store in plan.stores],
        [(load.seq_id, load.page_ids) for load in plan.loads],
    )
    return hashlib.blake2b(msgspec.msgpack.encode(decisions), digest_size=8).hexdigest()


class WatchedLevels:
    """Notes what the levels answer: decisions depend on it."""

    def __init__(self, levels: LowerLevels):
        self._levels = levels
        self.answers: list[tuple[Held, ...]] = []
        self.rooms: list[int] = []

    @property
    def names(self) -> tuple[str, ...]:
        """As the levels say."""
        return self._levels.names

    @property
    def store_at_uses(self) -> tuple[int, ...]:
        """As the levels say."""
        return self._levels.store_at_uses

    @property
    def wants_evicted(self) -> bool:
        """As the levels say."""
        return self._levels.wants_evicted

    def num_storable(self) -> int:
        """As the levels say."""
        self.rooms.append(self._levels.num_storable())
        return self.rooms[-1]

    def probe(self, links: Sequence[ChainLink]) -> tuple[Held, ...]:
        """As the levels say."""
        self.answers.append(self._levels.probe(links))
        return self.answers[-1]

    def evicted(self, keys: Sequence[PageKey]) -> dict[str, list[Evicted | None]]:
        """As the levels say; nothing depends on it."""
        return self._levels.evicted(keys)

    @property
    def other_roots(self) -> tuple[PageKey, ...]:
        """As the levels say; nothing depends on it."""
        return self._levels.other_roots

    def holder(self, key: PageKey) -> str | None:
        """As the levels say; nothing depends on it."""
        return self._levels.holder(key)


@dataclass(slots=True)
class _Output:
    tokens: list[int]
    chain: PrefixChain


@dataclass(slots=True)
class _Open:
    """A request with an output that has not ended."""

    number: int
    request: Request
    prompt: PrefixChain
    num_open: int
    outputs: dict[int, _Output] = field(default_factory=dict)


@dataclass(slots=True)
class _Ends:
    stops: list[EndedOutput] = field(default_factory=list)
    others: list[EndedOutput] = field(default_factory=list)
    failures: list[EndedOutput] = field(default_factory=list)


@dataclass(slots=True)
class _Planned:
    """A step whose result is not there yet."""

    step: RecordedStep
    events: Sequence[Event]
    """Not yet written down: who was refused is known when the outputs come."""


class Recorder:
    """Writes one line a step to a new file that only its owner may read.

    Sees what goes into the engine and what comes out, and needs nothing of its insides. Where the
    file can't be written any more (a full disk), it says so and records no further: what was
    recorded until then is whole.
    """

    def __init__(
        self,
        file: IO[bytes],
        scheduler: SchedulerConfig,
        levels: LowerLevels | None = None,
    ):
        """Write the header. Raises ConfigError where that fails."""
        self._file: IO[bytes] | None = file
        self._page_size = scheduler.page_size
        self._root: PageKey = root_key(secrets.token_bytes(32))
        self._open: dict[RequestId, _Open] = {}
        self._planned: deque[_Planned] = deque()
        self._num_requests = 0
        self._tenants: dict[str, int] = {}
        self._pins: dict[RequestId, int] = {}
        """Requests that asked for a pin which nobody gave up."""
        self.levels = None if levels is None else WatchedLevels(levels)
        """To be asked in place of `levels`."""
        header = Header(
            VERSION,
            scheduler,
            None if levels is None else levels.store_at_uses,
            levels is not None and levels.wants_evicted,
            () if levels is None else levels.names,
        )
        try:
            _write(file, header)
        except OSError as error:
            raise ConfigError(f"the recording can't be written: {error.strerror}") from None

    def planned(self, now_s: float, events: Sequence[Event], plan: StepPlan, num_held: int) -> None:
        """Note what a step was given, and what was decided while `num_held` others were held."""
        step = RecordedStep(
            step_id=plan.step_id,
            at_s=now_s,
            decisions=plan_digest(plan),
            num_held=num_held,
            probes=_drained(self.levels.answers) if self.levels else (),
            store_rooms=_drained(self.levels.rooms) if self.levels else (),
        )
        if self._file is not None:
            self._planned.append(_Planned(step, events))

    def applied(self, result: StepResult, outputs: StepOutputs, pins: Collection[str]) -> None:
        """Write down the first of the planned steps, whose result this is.

        `pins` are the names of those there are: others are forgotten from time to time.
        """
        if self._file is None:
            return
        refused = deque(outputs.rejections)
        for planned in self._planned:
            recorded = [self._event(event, refused) for event in planned.events]
            if recorded:
                told = tuple(event for event in recorded if event is not None)
                planned.step = msgspec.structs.replace(planned.step, events=told)
                planned.events = ()
        pages: list[FilledPage] = []
        ends = _Ends()
        for output in outputs.outputs:
            self._output(output, pages, ends)
        if len(self._pins) > 2 * len(pins) + 64:
            self._pins = {name: number for name, number in self._pins.items() if name in pins}
        step = msgspec.structs.replace(
            self._planned.popleft().step,
            elapsed_s=result.elapsed_s,
            pages=tuple(pages),
            stops=tuple(ends.stops),
            other_ends=tuple(ends.others),
            failures=tuple(ends.failures),
        )
        try:
            _write(self._file, step)
        except OSError as error:
            _logger.error(
                "step %d can't be recorded, and none after it: %s", step.step_id, error.strerror
            )
            self.close()

    def close(self) -> None:
        """Close the file and record nothing more. Idempotent."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is buffered is tried once more
                self._file.close()
        self._file = None
        self._planned.clear()
        self._open.clear()
        self._pins.clear()

    def _event(self, event: Event, refused: deque[Rejection]) -> RecordedEvent | None:
        match event:
            case PagesLoaded() | PagesLost() | LevelsFlushed():
                return event
            case Flush(query_id, level):
                return RecordedFlush(query_id, level)
            case Arrival(request):
                return None if self._is_refused(request, refused) else self._arrival(request)
            case Abort(request_id):
                known = self._open.get(request_id)
                return None if known is None else RecordedAbort(known.number)
            case Unpin(request_id):
                number = self._pins.pop(request_id, None)
                return None if number is None else RecordedUnpin(number)
            case Finish(request_id, output_index, num_tokens):
                known = self._open.get(request_id)
                if known is None:
                    return None
                return RecordedFinish(known.number, output_index, num_tokens)

    def _is_refused(self, request: Request, refused: deque[Rejection]) -> bool:
        """Whether the next refusal, in order of arrival, is this request's; takes it out then."""
        if not refused or refused[0].request_id != request.request_id:
            return False
        is_duplicate = refused[0].code == "duplicate_request"
        if is_duplicate != (request.request_id in self._open):
            return False
        refused.popleft()
        return True

    def _arrival(self, request: Request) -> RecordedArrival:
        chain = PrefixChain(self._root, request.namespace, self._page_size, request.shared)
        chain.extend(request.prompt_token_ids)
        self._num_requests += 1
        if request.retention.pin:
            self._pins[request.request_id] = self._num_requests
        self._open[request.request_id] = _Open(self._num_requests, request, chain, request.n)
        return RecordedArrival(
            self._num_requests,
            len(request.prompt_token_ids),
            tuple(map(_name, chain.links)),
            request.sampling.max_new_tokens,
            request.n,
            request.priority,
            request.sampling.prompt_logprobs,
            request.retention,
            self._tenant(request),
            request.tenant_pages,
            request.is_idle,
        )

    def _tenant(self, request: Request) -> int:
        if request.tenant_pages is None and not request.retention.pin:
            return 0
        return self._tenants.setdefault(request.tenant, len(self._tenants) + 1)

    def _output(
        self,
        output: SequenceOutput,
        pages: list[FilledPage],
        ends: _Ends,
    ) -> None:
        known = self._open.get(output.request_id)
        if known is None:
            return  # the client used an id again within one step; the rerun will say so
        num_prompt = len(known.request.prompt_token_ids)
        one = known.outputs.get(output.output_index)
        if one is None:
            one = _Output(list(known.request.prompt_token_ids), known.prompt.fork(num_prompt))
            known.outputs[output.output_index] = one
        one.tokens.extend(sample.token_id for sample in output.samples)
        num_links = len(one.chain.links)
        one.chain.extend(one.tokens)
        for i in range(num_links, len(one.chain.links)):
            page = _name(one.chain.links[i])
            pages.append(FilledPage(known.number, output.output_index, i, page))
        if output.finished is not None:
            num_tokens = len(one.tokens) - num_prompt
            ended = EndedOutput(known.number, output.output_index, num_tokens)
            if output.finished.reason is FinishReason.ERROR:
                ends.failures.append(ended)
            elif output.finished.stop_token_id is not None:
                ends.stops.append(ended)
            else:
                ends.others.append(ended)
            known.num_open -= 1
            if not known.num_open:
                del self._open[output.request_id]


def _write(file: IO[bytes], line: Header | RecordedStep) -> None:
    file.write(msgspec.json.encode(line) + b"\n")
    file.flush()


def _drained(answers: list[_T]) -> tuple[_T, ...]:
    taken = tuple(answers)
    answers.clear()
    return taken


def _name(link: ChainLink) -> str:
    return link.key[:PAGE_NAME_BYTES].hex()


def create_file(path: Path) -> IO[bytes]:
    """A new file at `path`, or at `path.1` and so on where that exists. Raises ConfigError."""
    for number in range(1000):
        candidate = path.with_name(f"{path.name}.{number}") if number else path
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            return os.fdopen(os.open(candidate, flags, 0o600), "wb")
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{candidate} can't be written: {error.strerror}") from None
    raise ConfigError(f"{path} and a thousand numbered files beside it exist already")


def read_header(line: bytes) -> Header:
    """A recording's first line. Raises ConfigError."""
    try:
        header = msgspec.json.decode(line, type=Header)
    except msgspec.DecodeError as error:
        raise ConfigError(f"this is no recording: {error}") from None
    if header.kvpaging_recording != VERSION:
        raise ConfigError(
            f"the recording is of version {header.kvpaging_recording}; this reads {VERSION}"
        )
    return header


def read_steps(file: IO[bytes]) -> Iterator[RecordedStep]:
    """All steps after the header. A last line that was cut off is left out. Raises ConfigError."""
    decoder = msgspec.json.Decoder(RecordedStep)
    for number, line in enumerate(file, 2):
        if not line.endswith(b"\n"):
            return
        try:
            yield decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"line {number} of the recording: {error}") from None


class PageNumbers:
    """Small numbers for the names of pages, from 1 on."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def of(self, page: str) -> int:
        """The same number for the same name."""
        return self._numbers.setdefault(page, len(self._numbers) + 1)


@dataclass(slots=True)
class _Told:
    arrival_s: float
    num_prompt_tokens: int
    blocks: list[int]
    num_output_tokens: int = 0
    output_blocks: dict[int, int] = field(default_factory=dict)


def read_requests(file: IO[bytes]) -> Iterator[TraceRequest]:
    """A recording as a trace: each request with what its first output filled.

    Raises ConfigError. Reads the whole recording before it gives the first request.
    """
    read_header(file.readline())
    numbers = PageNumbers()
    told: dict[int, _Told] = {}
    for step in read_steps(file):
        for event in step.events:
            if isinstance(event, RecordedArrival):
                blocks = [numbers.of(page) for page in event.pages]
                told[event.request] = _Told(step.at_s, event.num_prompt_tokens, blocks)
        for filled in step.pages:
            if not filled.output_index:
                request = told[filled.request]
                request.output_blocks[filled.page_index] = numbers.of(filled.page)
        for ended in (*step.stops, *step.other_ends):
            if not ended.output_index:
                told[ended.request].num_output_tokens = ended.num_tokens
    for request in told.values():
        yield TraceRequest(
            request.arrival_s,
            request.num_prompt_tokens,
            request.num_output_tokens,
            request.blocks,
            tuple(request.output_blocks[i] for i in sorted(request.output_blocks)),
        )
