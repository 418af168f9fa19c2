"""Host time of a step outside the model: schedule, build the batch's tensors, apply.

All sequences decode at 8k tokens. A new page a sequence is due every `page_size` steps, at the same
time for none of them. Prints the median over the steps, in microseconds, for several numbers of
sequences and of pages; no operation may be linear in the number of pages.

    python benchmarks/scheduler.py [--steps 64] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from kvpaging.base.config import SchedulerConfig
from kvpaging.base.ids import RequestId
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.execution.batch_builder import BatchBuilder
from kvpaging.scheduling.events import Arrival
from kvpaging.scheduling.plan import Sample, StepPlan, StepResult
from kvpaging.scheduling.request import Request, SamplingParams
from kvpaging.scheduling.scheduler import Scheduler

PAGE_SIZE = 16
CONTEXT = 8192
VOCAB = 32_000


@dataclass(frozen=True)
class Row:
    """One line of the table; times are medians in microseconds."""

    num_seqs: int
    num_pages: int
    schedule_us: float
    apply_us: float
    schedule_and_apply_us: float
    build_us: float
    total_us: float


def results(plan: StepPlan) -> StepResult:
    """What an executor would say, without a model."""
    sample = Sample(plan.step_id % VOCAB)
    return StepResult(
        plan.step_id, tuple((sample,) * len(entry.sample_for) for entry in plan.scheduled)
    )


def measure(num_seqs: int, num_pages: int, steps: int) -> Row:
    """Fill a scheduler with `num_seqs` sequences of 8k tokens each and time decode steps."""
    config = SchedulerConfig(
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=1 << 20,
        max_model_len=2 * CONTEXT,
        max_num_waiting=num_seqs,
    )
    cache = CacheManager(num_pages, PAGE_SIZE)
    scheduler = Scheduler(config, cache, vocab_size=VOCAB)
    builder = BatchBuilder(PAGE_SIZE, torch.device("cpu"))
    sampling = SamplingParams(max_new_tokens=CONTEXT, seed=0)
    events = [
        Arrival(
            Request(RequestId(f"{i}"), (i + 1,) * (CONTEXT - PAGE_SIZE - i % PAGE_SIZE), sampling)
        )
        for i in range(num_seqs)
    ]
    schedule, apply, build = [], [], []
    while events or scheduler.num_running < num_seqs or len(schedule) < steps:
        warm = scheduler.num_running < num_seqs
        started = time.perf_counter()
        plan = scheduler.schedule(events, started)
        planned = time.perf_counter()
        for seq_id in plan.removed:
            builder.remove(seq_id)
        for sequence in plan.added:
            builder.add(sequence)
        builder.build(plan.scheduled)
        built = time.perf_counter()
        result = results(plan)
        rows = [builder.row_of(entry.seq_id) for entry in plan.scheduled if entry.sample_for]
        builder.append(np.array(rows), torch.full((len(rows),), plan.step_id % VOCAB))
        before = time.perf_counter()
        scheduler.apply(plan, result, before)
        after = time.perf_counter()
        events = []
        if not warm and plan.num_new_tokens == num_seqs:
            schedule.append(planned - started)
            build.append(built - planned)
            apply.append(after - before)
    both = [a + b for a, b in zip(schedule, apply, strict=True)]
    total = [a + b for a, b in zip(both, build, strict=True)]
    return Row(
        num_seqs,
        num_pages,
        *(statistics.median(t) * 1e6 for t in (schedule, apply, both, build, total)),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cases = [(1, 1 << 17), (32, 1 << 17), (256, 1 << 18), (256, 1_000_000), (1024, 1_000_000)]
    rows = [measure(num_seqs, num_pages, arguments.steps) for num_seqs, num_pages in cases]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(
        f"{'seqs':>6} {'pages':>9} {'schedule':>9} {'apply':>9} {'both':>9} {'build':>9} {'all':>9}"
    )
    for row in rows:
        print(
            f"{row.num_seqs:6} {row.num_pages:9} {row.schedule_us:9.0f} {row.apply_us:9.0f} "
            f"{row.schedule_and_apply_us:9.0f} {row.build_us:9.0f} {row.total_us:9.0f}"
        )


if __name__ == "__main__":
    main()
