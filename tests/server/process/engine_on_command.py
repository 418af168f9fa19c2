"""An engine process without a model, for the supervisor's tests: prompts are commands.

Started by path with the arguments of `kvpaging.engine.process`. `EngineOptions.model` says how the
start goes, a prompt's first token what the engine does with the request; see `Start` and `Do`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from enum import IntEnum, StrEnum
from pathlib import Path

from kvpaging.base.config import EngineConfig, EngineOptions, SchedulerConfig
from kvpaging.base.errors import BadRequest, ConfigError
from kvpaging.cache.pins import PinState
from kvpaging.engine import process
from kvpaging.engine.messages import CacheStats, EngineStats, PageState
from kvpaging.scheduling import admission
from kvpaging.scheduling.events import Abort, Arrival, Event, Finish
from kvpaging.scheduling.outputs import (
    Finished,
    FinishReason,
    Rejection,
    SequenceOutput,
    StepOutputs,
    Timings,
)
from kvpaging.scheduling.plan import Sample
from kvpaging.scheduling.request import Request


class Start(StrEnum):
    WELL = "well"
    REFUSE = "refuse"
    RAISE = "raise"
    KILLED = "killed"
    SLOWLY = "slowly"
    """Takes a minute."""
    HANG = "hang"
    """It says nothing more, as an engine does that is busy in native code."""
    GARBAGE = "garbage"


class Do(IntEnum):
    COUNT = 1
    """Tokens 0, 1, 2, ... one a step, for each output."""
    RAISE = 2
    HANG = 3
    KILL = 4
    WAIT = 5
    """Never any token."""
    FLOOD = 6
    """All the tokens at once, each in an output of its own."""
    REJECT = 7
    """As overloaded."""
    HOLD = 8
    """One token; the others once there is a file `go` in the working directory."""


NO_TIMINGS = Timings(0.0, 0.0, 0.0)


def _finished(reason: FinishReason) -> Finished:
    return Finished(reason, None, NO_TIMINGS, 0, 0)


class FakeEngine:
    def __init__(self, config: EngineConfig):
        self.config = config
        self._requests: dict[str, Request] = {}
        self._num_tokens: dict[tuple[str, int], int] = {}
        self._aborted: list[str] = []
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def due_in_s(self) -> float | None:
        return None

    def stats(self) -> EngineStats:
        return EngineStats(
            step_id=self._steps,
            num_running=len(self._requests),
            num_evicted_pages=len(self._aborted),  # read by the tests: aborts that arrived
        )

    def cache_stats(self, query_id: int) -> CacheStats:
        return CacheStats(query_id)

    def pages(self) -> tuple[PageState, ...]:
        return tuple(PageState(i, "free", 0, 0) for i in range(1, 4))

    def pins(self, tenant: str | None, name: str | None) -> tuple[PinState, ...]:
        return (PinState("p", "t", 3, True, None),)

    def audit_idle(self) -> bool:
        return False

    def store_rest(self) -> None:
        pass

    def close(self) -> None:
        pass

    def step(self, events: Sequence[Event]) -> StepOutputs:
        self._steps += 1
        outputs: list[SequenceOutput] = []
        rejections: list[Rejection] = []
        for event in events:
            match event:
                case Arrival(request):
                    self._arrive(request, rejections)
                case Abort(request_id):
                    self._aborted.append(request_id)
                    self._requests.pop(request_id, None)
                case Finish(request_id, index, _):
                    outputs += self._end(request_id, index, FinishReason.STOP)
        for request in list(self._requests.values()):
            outputs += self._compute(request)
        time.sleep(0.001)
        return StepOutputs(tuple(outputs), tuple(rejections))

    def _arrive(self, request: Request, rejections: list[Rejection]) -> None:
        if request.prompt_token_ids[0] == Do.REJECT:
            rejections.append(Rejection(request.request_id, "too much to do", "overloaded"))
            return
        try:
            admission.check(request, self.config.scheduler, self.config.vocab_size)
        except BadRequest as error:
            told = Rejection(request.request_id, error.message, error.code, error.param)
            rejections.append(told)
            return
        self._requests[request.request_id] = request
        for index in range(request.n):
            self._num_tokens[request.request_id, index] = 0

    def _compute(self, request: Request) -> list[SequenceOutput]:
        match request.prompt_token_ids[0]:
            case Do.RAISE:
                raise RuntimeError("told to raise")
            case Do.HANG:
                time.sleep(3600)
            case Do.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Do.FLOOD:
                return [
                    o for _ in range(request.sampling.max_new_tokens) for o in self._count(request)
                ]
            case Do.COUNT:
                return self._count(request)
            case Do.HOLD if self._num_tokens[request.request_id, 0] == 0 or Path("go").exists():
                return self._count(request)
        return []

    def _count(self, request: Request) -> list[SequenceOutput]:
        outputs: list[SequenceOutput] = []
        for index in range(request.n):
            number = self._num_tokens.get((request.request_id, index))
            if number is None:
                continue
            self._num_tokens[request.request_id, index] = number + 1
            outputs.append(SequenceOutput(request.request_id, index, (Sample(number),), 0))
            if number + 1 == request.sampling.max_new_tokens:
                outputs += self._end(request.request_id, index, FinishReason.LENGTH)
        return outputs

    def _end(self, request_id: str, index: int, reason: FinishReason) -> list[SequenceOutput]:
        if self._num_tokens.pop((request_id, index), None) is None:
            return []
        if not any(owner == request_id for owner, _ in self._num_tokens):
            del self._requests[request_id]
        return [SequenceOutput(request_id, index, (), 0, _finished(reason))]


def make_engine(options: EngineOptions, on_progress: process.OnProgress) -> FakeEngine:
    match options.model:
        case Start.REFUSE:
            raise ConfigError("no such checkpoint")
        case Start.RAISE:
            raise RuntimeError("told to raise")
        case Start.KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        case Start.SLOWLY:
            for done in range(600):
                on_progress("loading weights", done, 600)
                time.sleep(0.1)
        case Start.HANG:
            time.sleep(3600)
        case Start.GARBAGE:
            os.write(int(sys.argv[1]), b"\xff" * 64)
    scheduler = SchedulerConfig(
        num_pages=10_000,
        page_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=100_000,
        max_num_waiting=options.max_num_waiting,
    )
    return FakeEngine(
        EngineConfig(
            model_dir="fake",
            architecture="FakeModel",
            device="cpu",
            dtype="float32",
            kv_cache_dtype="float32",
            threads=1,
            kernels="none",
            exact=True,
            kv_cache_bytes=1024,
            vocab_size=100,
            eos_token_ids=(0,),
            scheduler=scheduler,
        )
    )


if __name__ == "__main__":
    sys.exit(process.main(sys.argv[1:], make_engine))
