"""What writing pages to a disk costs decoding: step times with a full write queue and without.

The bundled model decodes 8 sequences on the native path with a disk level; pages of random bytes
are put to the thread that writes through, as many as keep it busy all the time.

    python benchmarks/decode_beside_writing.py [--steps 150] [--turns 3] [--compress]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path

from kvpaging.base import threads
from kvpaging.base.config import EngineOptions
from kvpaging.base.ids import PageKey, RequestId
from kvpaging.engine.engine import Engine
from kvpaging.levels.level import StoredPage
from kvpaging.scheduling.events import Arrival
from kvpaging.scheduling.request import Request, SamplingParams

PAGES = 64
GIB = 1 << 30


def pages(turn: int, page_bytes: int) -> list[StoredPage]:
    """New ones each time."""
    payload = os.urandom(page_bytes)
    keys = [PageKey(hashlib.sha256(b"%d %d" % (turn, n)).digest()) for n in range(PAGES)]
    return [StoredPage(key, key, bytes(64), payload) for key in keys]


def step_ms(engine: Engine, steps: int, *, writes: bool, seed: int) -> tuple[float, float]:
    """Median milliseconds of a decoding step, and MB/s written meanwhile."""
    mover = engine._executor.lower_levels  # a benchmark may look inside
    [lane] = mover._lanes  # type: ignore[union-attr]
    page_bytes = engine.cache_stats().page_bytes
    sampling = SamplingParams(max_new_tokens=steps + 20, seed=seed, ignore_eos=True)
    requests = [
        Request(RequestId(f"{seed}-{i}"), tuple(range(10 + i, 74 + i)), sampling) for i in range(8)
    ]
    engine.step([Arrival(request) for request in requests])
    while engine.stats().num_waiting:
        engine.step()
    times = []
    written, started = lane.level.stats().written_bytes, time.perf_counter()
    turn = 0
    while len(times) < steps:
        while writes and lane.stores.qsize() < 4:
            turn += 1
            mover._queue(pages(1000 * seed + turn, page_bytes), [lane])  # type: ignore[union-attr]
        before = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - before)
    seconds = time.perf_counter() - started
    rate = (lane.level.stats().written_bytes - written) / seconds / 1e6
    while engine.has_work:
        engine.step()
    return statistics.median(times) * 1e3, rate


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--compress", action="store_true")
    arguments = parser.parse_args()
    print(f"{'writing threads':>16} {'step ms alone':>14} {'beside writing':>15} {'MB/s':>6}")
    seed = 0
    for niceness in (0, threads.NICENESS) * arguments.turns:
        threads.NICENESS = niceness  # type: ignore[misc]
        with tempfile.TemporaryDirectory() as directory:
            engine = Engine.from_options(
                EngineOptions(
                    model=str(resources.files("kvpaging") / "demo_model"),
                    device="cpu",
                    kv_cache_memory_bytes=64 << 20,
                    disk_cache_dir=str(Path(directory) / "cache"),
                    disk_cache_bytes=2 * GIB,
                    disk_cache_compress=arguments.compress,
                )
            )
            alone, _ = step_ms(engine, arguments.steps, writes=False, seed=seed + 1)
            beside, rate = step_ms(engine, arguments.steps, writes=True, seed=seed + 2)
            engine.close()
        seed += 2
        print(f"{f'nice {niceness}':>16} {alone:14.2f} {beside:15.2f} {rate:6.0f}")


if __name__ == "__main__":
    main()
