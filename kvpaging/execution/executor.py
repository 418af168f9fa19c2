"""The seam between policy and work: plans in, results out, on one or more workers.

A plan is submitted and its result asked for later, so that the next plan can be made meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvpaging.cache.lower_levels import LevelsFlushed, LowerLevels, PagesLoaded, PagesLost
from kvpaging.levels.level import BelowStats
from kvpaging.scheduling.plan import StepPlan, StepResult


class RunningStep(Protocol):
    """A plan that was submitted."""

    def result(self) -> StepResult:
        """Wait until its work is done; what was sampled.

        An exception means that the whole step failed. Asked once, in the order of submission.
        """


class Executor(Protocol):
    """Runs plans in the order they were made."""

    @property
    def lower_levels(self) -> LowerLevels | None:
        """What is below the device, where there is anything."""

    def below(self) -> BelowStats:
        """State and totals of the levels below the device. Does not wait for any."""

    def submit(self, plan: StepPlan) -> RunningStep:
        """Do the plan's work, now or beside the caller, after that of all plans before it.

        A plan may go on with tokens that plans before it sample and whose results nobody has seen.
        Changes the KV pool and the runner's rows. Loads only begin. Raises as `result` does.
        """

    def completions(self) -> Sequence[PagesLoaded | PagesLost | LevelsFlushed]:
        """Loads and flushes that ended since the last call, each once, and what levels have lost.

        Does not wait.
        """

    def wait(self, timeout_s: float) -> None:
        """Wait until a load has ended, at most so long; for steps that have nothing else to do."""

    def close(self) -> None:
        """Give memory back; plans under way end first. Idempotent."""
