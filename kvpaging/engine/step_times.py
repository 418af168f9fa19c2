"""How long steps take on this machine, as the few numbers that a simulation needs.

Runs the engine itself, with made-up prompts: prefill of several lengths, decoding at several
numbers of sequences and context lengths. Fits `StepTimes` by least relative squares. A machine's
speed changes by a tenth and more within a minute: what is fitted is the mean of what was seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from kvpaging.base.clock import monotonic
from kvpaging.base.config import EngineConfig, EngineOptions
from kvpaging.cache.lower_levels import LevelsFlushed, LowerLevels, PagesLoaded, PagesLost
from kvpaging.engine.engine import Engine
from kvpaging.execution.executor import Executor, RunningStep
from kvpaging.levels.level import BelowStats
from kvpaging.replay.full_mode import StepTimes, StepWork
from kvpaging.scheduling.events import Event
from kvpaging.scheduling.outputs import StepOutputs
from kvpaging.scheduling.plan import StepPlan, StepResult
from kvpaging.scheduling.request import SamplingParams

CASES: Final = (
    (1, 16, 24),
    (1, 128, 16),
    (1, 512, 16),
    (1, 2048, 16),
    (1, 6000, 8),
    (4, 64, 24),
    (4, 512, 16),
    (16, 32, 24),
    (16, 256, 16),
)
"""(sequences, prompt tokens, steps of decoding)."""
FIT_ROUNDS: Final = 20

_Array = npt.NDArray[np.float64]


class StepPoint(msgspec.Struct, frozen=True):
    """One step as it was measured."""

    work: StepWork
    seconds: float


class MeasuredSteps(msgspec.Struct, frozen=True):
    """What the machine was found to take."""

    model: str
    device: str
    times: StepTimes
    error_ratio: float
    """Median relative error of the fit over the measured steps."""
    num_steps: int


@dataclass(slots=True)
class _WatchedStep:
    """A `executor.RunningStep` that says when its result was asked for."""

    plan: StepPlan
    running: RunningStep
    watched: _Watched

    def result(self) -> StepResult:
        self.watched.plan = self.plan
        return self.running.result()


class _Watched:
    """An `executor.Executor` that keeps the plan whose result was asked for last."""

    def __init__(self, executor: Executor):
        self._executor = executor
        self.plan: StepPlan | None = None

    @property
    def lower_levels(self) -> LowerLevels | None:
        return self._executor.lower_levels

    def submit(self, plan: StepPlan) -> RunningStep:
        return _WatchedStep(plan, self._executor.submit(plan), self)

    def below(self) -> BelowStats:
        return self._executor.below()

    def completions(self) -> Sequence[PagesLoaded | PagesLost | LevelsFlushed]:
        return self._executor.completions()

    def wait(self, timeout_s: float) -> None:
        self._executor.wait(timeout_s)

    def close(self) -> None:
        self._executor.close()


class MeasuredEngine(Engine):
    """An engine that notes how long each of its steps took, host work included."""

    def __init__(self, config: EngineConfig, executor: Executor):
        self.watched = _Watched(executor)
        super().__init__(config, self.watched)
        self.points: list[StepPoint] = []

    def step(self, events: Sequence[Event] = ()) -> StepOutputs:
        """As `Engine.step`."""
        started = monotonic()
        outputs = super().step(events)
        plan = self.watched.plan
        if plan is not None and plan.scheduled:
            self.points.append(StepPoint(StepWork.of(plan), monotonic() - started))
        return outputs


def fit(points: Sequence[StepPoint]) -> tuple[StepTimes, float]:
    """Step times and the median relative error; no term is negative.

    Least squares of the errors relative to what is fitted, not to what was measured: that would
    trust the steps that happened to be fast, and fit less than the mean (by 16 to 22 % of decoding
    where steps vary by a third). So it is done some times over, each with the last one's times.
    """
    seconds = np.array([point.seconds for point in points])
    terms = np.array([(1.0, *point.work) for point in points])
    fitted = seconds
    for _ in range(FIT_ROUNDS):
        values = _fit_relative(terms, seconds, fitted)
        fitted = np.maximum(terms @ values, 1e-9)
    errors = np.abs(fitted - seconds) / seconds
    return StepTimes(*map(float, values)), float(np.median(errors))


def _fit_relative(terms: _Array, seconds: _Array, scale: _Array) -> _Array:
    """Least squares of `(terms @ values - seconds) / scale`; no value is negative."""
    used = list(range(terms.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(terms[:, used] / scale[:, None], seconds / scale, rcond=None)
        if found.min() >= 0 or len(used) == 1:
            break
        used.pop(int(found.argmin()))
    values = np.zeros(terms.shape[1])
    values[used] = np.maximum(found, 0.0)
    return values


def measure(options: EngineOptions) -> MeasuredSteps:
    """Load the model and measure. Takes some seconds on a small model. Raises ConfigError."""
    config, points = measure_points(options)
    times, error_ratio = fit(points)
    return MeasuredSteps(config.model_dir, config.device, times, error_ratio, len(points))


def measure_points(options: EngineOptions) -> tuple[EngineConfig, list[StepPoint]]:
    """Load the model, and run the cases, forth and back. Raises ConfigError."""
    from kvpaging.execution.loading import load_executor

    config, executor = load_executor(options)
    engine = MeasuredEngine(config, executor)
    try:
        return config, _points(engine)
    finally:
        engine.close()


def _points(engine: MeasuredEngine) -> list[StepPoint]:
    scheduler = engine.config.scheduler
    lot = random.Random(0)
    engine.generate([[1] * 8], SamplingParams(max_new_tokens=4, seed=0))  # warm up
    engine.points.clear()
    for num_seqs, length, num_steps in (*CASES, *reversed(CASES)):
        longest = min(
            scheduler.max_model_len, scheduler.num_pages * scheduler.page_size // num_seqs
        )
        num_seqs = min(num_seqs, scheduler.max_num_seqs)
        length = min(length, longest - num_steps - 1)
        if length < 1:
            continue
        vocab = engine.config.vocab_size
        prompts = [[lot.randrange(vocab) for _ in range(length)] for _ in range(num_seqs)]
        sampling = SamplingParams(max_new_tokens=num_steps, seed=0, ignore_eos=True)
        engine.generate(prompts, sampling)
    return engine.points
