"""The seam between policy and work: one plan in, one result out, on one or more workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvpaging.cache.lower_levels import LowerLevels, PagesLoaded
from kvpaging.scheduling.plan import StepPlan, StepResult


class Executor(Protocol):
    """Runs plans in the order they were made."""

    @property
    def lower_levels(self) -> LowerLevels | None:
        """What is below the device, where there is anything."""

    def run(self, plan: StepPlan) -> StepResult:
        """Do the plan's work and return what was sampled.

        Changes the KV pool and the runner's rows. Loads only begin. An exception means that the
        whole step failed.
        """

    def completions(self) -> Sequence[PagesLoaded]:
        """Loads that ended since the last call, each once. Does not wait."""

    def wait(self, timeout_s: float) -> None:
        """Wait until a load has ended, at most so long; for steps that have nothing else to do."""

    def close(self) -> None:
        """Give memory back. Idempotent."""
