"""The executor of one process and one device."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from kernels.ops import Ops
from kvpaging.base.clock import monotonic
from kvpaging.base.errors import LawBroken
from kvpaging.cache.lower_levels import LowerLevels, PagesLoaded
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.model_runner import ModelRunner
from kvpaging.execution.models.layers import CausalLM
from kvpaging.scheduling.plan import PageCopy, StepPlan, StepResult


class LocalExecutor:
    """Owns a model and its KV pool and runs plans on them, one after the other.

    An `executor.Executor`.
    """

    def __init__(
        self, model: CausalLM, pool: KVPool, ops: Ops, eos_token_ids: Collection[int] = ()
    ) -> None:
        self._ops = ops
        self._pool: KVPool | None = pool
        self._runner: ModelRunner | None = ModelRunner(model, pool, ops, eos_token_ids)

    @property
    def lower_levels(self) -> LowerLevels | None:
        """Nothing is below the device yet."""
        return None

    def completions(self) -> Sequence[PagesLoaded]:
        """Loads that ended; see `executor.Executor.completions`."""
        return ()

    def wait(self, timeout_s: float) -> None:
        """Nothing is ever being loaded; see `executor.Executor.wait`."""

    def run(self, plan: StepPlan) -> StepResult:
        """Do the plan's work; see `executor.Executor.run`."""
        runner, pool = self._runner, self._pool
        if runner is None or pool is None:
            raise LawBroken("a plan for an executor that is closed")
        started = monotonic()
        with torch.inference_mode():
            for seq_id in plan.removed:
                runner.remove(seq_id)
            for sequence in plan.added:
                runner.add(sequence)
            if plan.copies:
                self._copy(pool, plan.copies)
            if not plan.scheduled:
                return StepResult(plan.step_id, ())
            samples, failed = runner.run(plan.scheduled)
        return StepResult(plan.step_id, samples, failed, monotonic() - started)

    def close(self) -> None:
        """Let go of weights and pool. Idempotent."""
        self._runner = None
        self._pool = None

    def _copy(self, pool: KVPool, copies: Sequence[PageCopy]) -> None:
        device = pool.pages.device
        sources = torch.tensor([copy.source for copy in copies], device=device)
        targets = torch.tensor([copy.target for copy in copies], device=device)
        self._ops.copy_pages(pool.pages, sources, targets)
