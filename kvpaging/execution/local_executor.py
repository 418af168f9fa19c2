"""The executor of one process and one device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from kernels.ops import Ops
from kvpaging.base.clock import monotonic
from kvpaging.base.errors import LawBroken
from kvpaging.base.ids import StepId
from kvpaging.cache.lower_levels import LevelsFlushed, LowerLevels, PagesLoaded, PagesLost
from kvpaging.execution.decode_graphs import PADDED, Capture, Sizes
from kvpaging.execution.executor import RunningStep
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.model_runner import ModelRunner, RunningSamples
from kvpaging.execution.models.layers import CausalLM
from kvpaging.execution.page_mover import PageMover
from kvpaging.execution.transfer import to_device, use_device
from kvpaging.levels.level import BelowStats
from kvpaging.scheduling.plan import PageCopy, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class _Running:
    """An `executor.RunningStep` whose work was ordered."""

    step_id: StepId
    samples: RunningSamples | None
    """`None` where nothing is computed."""
    started_s: float
    executor: LocalExecutor

    def result(self) -> StepResult:
        """See `executor.RunningStep.result`."""
        if self.samples is None:
            return StepResult(self.step_id, ())
        found = self.samples.wait()
        # The device took it up when the step before was done.
        started = max(self.started_s, self.executor.last_ended_s)
        self.executor.last_ended_s = monotonic()
        return StepResult(
            self.step_id,
            found.samples,
            found.failed,
            self.executor.last_ended_s - started,
            found.prompt_logprobs,
        )


class LocalExecutor:
    """Owns a model, its KV pool and the levels below, and runs plans on them in order.

    An `executor.Executor`.
    """

    def __init__(
        self,
        model: CausalLM,
        pool: KVPool,
        ops: Ops,
        eos_token_ids: Collection[int] = (),
        mover: PageMover | None = None,
        *,
        async_scheduling: bool = False,
        capture: Capture | None = None,
        sizes: Sizes = PADDED,
    ) -> None:
        """With `async_scheduling` a CPU's steps run on a thread of their own.

        A GPU's steps run beside the caller in any case. `capture`, `sizes`: see `decode_graphs`.
        """
        self._ops = ops
        self._worker: ThreadPoolExecutor | None = None
        if async_scheduling and pool.pages.device.type == "cpu":
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="steps")
        self._mover = mover
        self.last_ended_s = 0.0
        """When the last step that computed was seen to be done."""
        self._pool: KVPool | None = pool
        self._runner: ModelRunner | None = ModelRunner(
            model, pool, ops, eos_token_ids, capture, sizes
        )

    @property
    def lower_levels(self) -> LowerLevels | None:
        """What is below the pool."""
        return self._mover

    def below(self) -> BelowStats:
        """The levels' totals; see `executor.Executor.below`."""
        return BelowStats() if self._mover is None else self._mover.stats()

    def completions(self) -> Sequence[PagesLoaded | PagesLost | LevelsFlushed]:
        """Loads and flushes that ended; see `executor.Executor.completions`."""
        return () if self._mover is None else self._mover.completions()

    def wait(self, timeout_s: float) -> None:
        """Wait for a load to end; see `executor.Executor.wait`."""
        if self._mover is not None:
            self._mover.wait(timeout_s)

    def submit(self, plan: StepPlan) -> RunningStep:
        """Do the plan's work; see `executor.Executor.submit`."""
        if self._worker is not None:
            return self._worker.submit(lambda: self._start(plan).result())
        return self._start(plan)

    def _start(self, plan: StepPlan) -> _Running:
        """Order the plan's work of the device; on a CPU it is done on return."""
        runner, pool = self._runner, self._pool
        if runner is None or pool is None:
            raise LawBroken("a plan for an executor that is closed")
        use_device(pool.pages.device)  # the caller may not be the thread that loaded
        started = monotonic()
        with torch.inference_mode():
            for seq_id in plan.removed:
                runner.remove(seq_id)
            for sequence in plan.added:
                runner.add(sequence)
            self._move(plan)
            if plan.copies:
                self._copy(pool, plan.copies)
            samples = runner.run(plan.scheduled) if plan.scheduled else None
        return _Running(plan.step_id, samples, started, self)

    def close(self) -> None:
        """Let go of weights and pool, when no plan is under way. Idempotent."""
        if self._worker is not None:
            self._worker.shutdown()
        self._runner = None
        self._pool = None
        if self._mover is not None:
            self._mover.close()
            self._mover = None

    def _move(self, plan: StepPlan) -> None:
        """Stores read their pages now; loads, which may write to the same pages, begin after.

        What is stored in a level that is emptied was ordered before that, and leaves it again.
        """
        if self._mover is None:
            return
        self._mover.store(plan.stores)
        self._mover.touch(plan.touches)
        for flush in plan.flushes:
            self._mover.flush(flush)
        for load in plan.loads:
            self._mover.begin(load)

    def _copy(self, pool: KVPool, copies: Sequence[PageCopy]) -> None:
        device = pool.pages.device
        sources = np.array([copy.source for copy in copies], dtype=np.int64)
        targets = np.array([copy.target for copy in copies], dtype=np.int64)
        self._ops.copy_pages(pool.pages, to_device(sources, device), to_device(targets, device))
