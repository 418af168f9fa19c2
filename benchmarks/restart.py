"""A server with a disk cache is killed and started again: the same conversation, from disk.

    python benchmarks/make_checkpoint.py CHECKPOINT
    python benchmarks/restart.py CHECKPOINT [--tokens 4096] [--repeats 3] [--compress] [--json]

Starts `kvpaging serve`, sends one long prompt and times its first token (cold), waits until its
pages are written, kills both processes with SIGKILL, starts the server again, and sends the same
prompt. The answers must be the same, tokens and log-probabilities, and almost all of the second
prompt must come from the cache. Then the same again on a server that was not killed (the device's
own cache). "from disk" follows after the system was told to forget the files. Times are from
sending the request to its first event, over HTTP; the median of the repeats, each with a prompt
and a directory of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

NEW_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """What came back, and when."""

    ttft_s: float
    cached_tokens: int
    samples: tuple[object, ...]
    """Token ids and log-probabilities."""


@dataclass(frozen=True)
class Row:
    """Medians of all repeats, in seconds."""

    tokens: int
    cold_s: float
    from_disk_s: float
    on_device_s: float
    faster: float
    """Cold by from disk."""
    ready_s: float
    """From starting the process until it is ready, with the pages on disk."""
    cached_tokens: int


@contextmanager
def server(model: Path, directory: Path, options: list[str]) -> Iterator[tuple[str, float]]:
    """A server of its own; its address and the seconds until it was ready. Ends by SIGKILL."""
    command = [sys.executable, "-P", "-m", "server", "serve", "--model", str(model), "--port", "0"]
    command += ["--disk-cache", str(directory), "--kv-cache-memory", "2GiB", *options]
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"address +(http://\S+)", line):
                break
        else:
            raise RuntimeError("the server ended before it was ready")
        yield found[1], time.perf_counter() - started
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.2)  # the engine process ends with its group, and lets go of the lock


def ask(url: str, tokens: list[int]) -> Answer:
    """One streamed request."""
    body = {
        "prompt": tokens,
        "max_new_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 3,
        "stream": True,
    }
    request = urllib.request.Request(
        url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    first_s, cached, samples = 0.0, 0, []
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            first_s = first_s or time.perf_counter() - started
            event = json.loads(line[6:])
            if "usage" in event:
                cached = event["usage"]["cached_tokens"]
            samples.append((event.get("token_ids"), event.get("logprobs")))
    # How tokens are grouped into events may differ; what they are may not.
    ids = [token for some, _ in samples for token in some or ()]
    logprobs = [entry for _, some in samples for entry in some or ()]
    return Answer(first_s, cached, (*ids, *map(json.dumps, logprobs)))


def wait_written(directory: Path) -> None:
    """Until nothing has been written for a while."""
    size, since = -1, time.monotonic()
    while time.monotonic() - since < 1.0:
        now = sum(path.stat().st_size for path in directory.glob("*.pages"))
        if now != size:
            size, since = now, time.monotonic()
        time.sleep(0.05)


def forget(directory: Path) -> None:
    """Ask the system to drop what it holds of these files in memory."""
    for path in directory.glob("*.pages"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def once(
    model: Path, directory: Path, tokens: list[int], options: list[str]
) -> tuple[Answer, Answer, Answer, float]:
    """(cold, from disk, on the device, seconds until ready). Raises where the answers differ."""
    warm_up = [3 + t % 1000 for t in range(64)]
    with server(model, directory, options) as (url, _):
        ask(url, warm_up)
        cold = ask(url, tokens)
        on_device = ask(url, tokens)
        wait_written(directory)
    forget(directory)
    with server(model, directory, options) as (url, ready_s):
        ask(url, warm_up[::-1])
        from_disk = ask(url, tokens)
    if not cold.samples == from_disk.samples == on_device.samples:
        raise RuntimeError(f"the answers differ: {cold.samples} {from_disk.samples}")
    if cold.cached_tokens or from_disk.cached_tokens < len(tokens) - 64:
        raise RuntimeError(f"cached: {cold.cached_tokens} cold, {from_disk.cached_tokens} after")
    return cold, from_disk, on_device, ready_s


def main() -> None:
    """Print one row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compress", action="store_true")
    parser.add_argument("--directory", type=Path, help="where the pages go")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    options = ["--disk-cache-compress"] if arguments.compress else []
    runs = []
    lot = random.Random(0)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as base:
        for index in range(arguments.repeats):
            tokens = [lot.randrange(3, 5000) for _ in range(arguments.tokens)]
            runs.append(once(arguments.model, Path(base) / str(index), tokens, options))
    cold_s, disk_s, device_s = (statistics.median(run[i].ttft_s for run in runs) for i in range(3))
    row = Row(
        arguments.tokens,
        round(cold_s, 3),
        round(disk_s, 3),
        round(device_s, 3),
        round(cold_s / disk_s, 1),
        round(statistics.median(run[3] for run in runs), 2),
        min(run[1].cached_tokens for run in runs),
    )
    if arguments.json:
        print(json.dumps(asdict(row)))
        return
    for name, value in asdict(row).items():
        print(f"{name:14} {value}")


if __name__ == "__main__":
    main()
