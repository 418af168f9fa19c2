"""What replaying costs: cache mode over made-up traces of 1, 10 and 100 times Mooncake's length.

Prints requests, pages, unique pages, seconds and peak memory of one policy at one capacity; each
size in a process of its own, so that one's memory is not another's.

    python benchmarks/replay_scale.py [--times 1 --times 10] [--policy lru] [--capacity 10000]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvpaging.replay.cache_mode import replay_cache
from kvpaging.replay.synthetic import conversations, write_mooncake
from kvpaging.replay.trace import open_trace

NUM_REQUESTS = 12_031


def measure(path: Path, policy: str, capacity: int | None) -> str:
    """One row of the table."""
    trace = open_trace(path)
    processor_s = time.process_time()
    outcome = replay_cache(trace, policy, capacity)
    processor_s = time.process_time() - processor_s
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{outcome.num_requests:>9} {outcome.num_pages:>10} {outcome.hit_ratio_pages:>9.4f} "
        f"{outcome.seconds:>8.2f} {processor_s:>8.2f} {peak_mib:>9.0f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, action="append")
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--capacity", default="10000", help="pages, or unlimited")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    capacity = None if options.capacity == "unlimited" else int(options.capacity)
    if options.measure is not None:
        print(measure(options.measure, options.policy, capacity))
        return
    print(
        f"{'requests':>9} {'pages':>10} {'hit ratio':>9} {'wall s':>8} {'CPU s':>8} {'peak MiB':>9}"
    )
    for times in options.times or (1, 10, 100):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.jsonl"
            write_mooncake(conversations(times * NUM_REQUESTS), path)
            flags = ["--policy", options.policy, "--capacity", options.capacity]
            command = [sys.executable, __file__, "--measure", str(path), *flags]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
