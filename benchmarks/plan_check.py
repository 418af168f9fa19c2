"""What `kvpaging plan` predicts beside what happens: the demo model on this machine, three loads.

At each rate, runs made-up conversations through a live engine in real time, with step times
measured right before and right after, since a machine's speed changes; and through the simulation
with these step times. Prints medians of the time to first token, tokens a second, hit ratios, and
what the live run's steps took beside what the step times say of the same steps: the rest of the
error is not theirs. Other work on the machine is part of it.

    python benchmarks/plan_check.py [--rate 2 --rate 6 --rate 12] [--requests 60] [--threads 1]
"""

from __future__ import annotations

import argparse
import os
import random
import time
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from kvpaging.base.config import EngineOptions
from kvpaging.base.ids import RequestId
from kvpaging.engine.engine import Engine
from kvpaging.engine.step_times import MeasuredEngine, fit, measure_points
from kvpaging.execution.loading import load_executor
from kvpaging.replay.full_mode import Limits, Simulation, StepTimes, quantile
from kvpaging.replay.synthetic import conversations
from kvpaging.replay.trace import MOONCAKE_BLOCK_SIZE, Trace, TraceRequest
from kvpaging.scheduling.events import Arrival
from kvpaging.scheduling.request import Request, SamplingParams

BLOCK = 32
MAX_OUTPUT = 64


@dataclass(frozen=True)
class Seen:
    """One run."""

    ttft_p50_s: float
    tokens_per_s: float
    hit_ratio: float


def requests(count: int, rate: float) -> list[TraceRequest]:
    """Conversations in blocks of `BLOCK` tokens, short enough for a small model on a CPU."""
    scaled = []
    for request in conversations(count, seed=5, requests_per_s=rate):
        num_prompt = -(-request.num_prompt_tokens * BLOCK // MOONCAKE_BLOCK_SIZE)
        num_output = 1 + request.num_output_tokens % MAX_OUTPUT
        scaled.append(replace(request, num_prompt_tokens=num_prompt, num_output_tokens=num_output))
    return scaled


def tokens(request: TraceRequest, vocab: int) -> tuple[int, ...]:
    """Random tokens that are alike where the blocks are."""
    found: list[int] = []
    for block in request.blocks:
        lot = random.Random(block)
        found += [lot.randrange(vocab) for _ in range(BLOCK)]
    return tuple(found[: request.num_prompt_tokens])


def total_s(engine: MeasuredEngine, times: StepTimes) -> tuple[float, float]:
    """What the engine's steps took, and what the times say of them."""
    points = engine.points
    return sum(point.seconds for point in points), sum(times.of_work(p.work) for p in points)


def live(engine: Engine, trace: list[TraceRequest]) -> Seen:
    """Requests at their time, each as soon as a step can take it."""
    vocab = engine.config.vocab_size
    arrivals = [
        Request(
            RequestId(str(index)),
            tokens(request, vocab),
            SamplingParams(max_new_tokens=request.num_output_tokens, seed=index, ignore_eos=True),
        )
        for index, request in enumerate(trace)
    ]
    first: dict[RequestId, float] = {}
    num_tokens = upcoming = 0
    started = time.monotonic()
    while upcoming < len(trace) or engine.has_work:
        now = time.monotonic() - started
        events = []
        while upcoming < len(trace) and trace[upcoming].arrival_s <= now:
            events.append(Arrival(arrivals[upcoming]))
            upcoming += 1
        if not events and not engine.has_work:
            time.sleep(trace[upcoming].arrival_s - now)
            continue
        for output in engine.step(events).outputs:
            num_tokens += len(output.samples)
            first.setdefault(output.request_id, time.monotonic() - started)
    seconds = time.monotonic() - started
    waits = [first[RequestId(str(i))] - request.arrival_s for i, request in enumerate(trace)]
    stats = engine.stats()
    return Seen(
        quantile(waits, 0.5),
        num_tokens / seconds,
        stats.prefix_hit_tokens / max(1, stats.prefix_queried_tokens),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, action="append")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    options = EngineOptions(
        model=str(resources.files("kvpaging") / "demo_model"),
        device="cpu",
        threads=arguments.threads,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=64 << 20,
    )
    print(f"{'req/s':>6} {'':>10} {'ttft p50 ms':>11} {'tokens/s':>9} {'hit ratio':>9}")
    for rate in arguments.rate or (2.0, 6.0, 12.0):
        made = requests(arguments.requests, rate)
        trace = Trace(Path(os.devnull), BLOCK, lambda _, made=made: iter(made))
        _, before = measure_points(options)
        engine = MeasuredEngine(*load_executor(options))
        engine.generate([[1] * 8], SamplingParams(max_new_tokens=2, seed=0))  # warm up
        engine.points.clear()
        measured = live(engine, made)
        scheduler = engine.config.scheduler
        engine.close()
        _, after = measure_points(options)
        times, _ = fit([*before, *after])
        outcome = Simulation(
            trace,
            "lru",
            scheduler.num_pages,
            scheduler.page_size,
            limits=Limits(scheduler.max_num_seqs, scheduler.max_num_batched_tokens),
            times=times,
        ).run()
        assert outcome.latencies is not None
        predicted = Seen(
            outcome.latencies.ttft_p50_s,
            outcome.num_output_tokens / outcome.latencies.simulated_s,
            outcome.hit_ratio_tokens,
        )
        for name, seen in (("predicted", predicted), ("measured", measured)):
            print(
                f"{rate:6.1f} {name:>10} {seen.ttft_p50_s * 1e3:11.1f} {seen.tokens_per_s:9.1f} "
                f"{seen.hit_ratio:9.4f}"
            )
        steps_s, fitted_s = total_s(engine, times)
        speeds = [total_s(engine, fit(points)[0])[1] / steps_s for points in (before, after)]
        print(
            f"{rate:6.1f} its {len(engine.points)} steps took {steps_s:.2f} s; by their times "
            f"{fitted_s / steps_s:.2f} of that (before {speeds[0]:.2f}, after {speeds[1]:.2f})"
        )


if __name__ == "__main__":
    main()
