"""The seam between policy and work: one plan in, one result out, on one or more workers."""

from __future__ import annotations

from typing import Protocol

from kvpaging.scheduling.plan import StepPlan, StepResult


class Executor(Protocol):
    """Runs plans in the order they were made."""

    def run(self, plan: StepPlan) -> StepResult:
        """Do the plan's work and return what was sampled.

        Changes the KV pool and the runner's rows. An exception means that the whole step failed.
        """

    def close(self) -> None:
        """Give memory back. Idempotent."""
