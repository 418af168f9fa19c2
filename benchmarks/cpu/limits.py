"""What the CPU benchmarks share: timing a call, and how fast this machine reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(call: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each call, at least five, after one that doesn't count."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def timed_beside_reading(
    call: Callable[[], Any], seconds: float, threads: int
) -> list[tuple[float, float]]:
    """For each call its seconds, and the bytes a second that memory gave just before and after.

    On a machine that is shared the bandwidth changes by half from one second to the next: only
    what was measured next to each other compares. 256 MiB are read, more than caches hold.
    """
    block = torch.ones(1 << 26)
    before = torch.get_num_threads()

    def read() -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        block.sum()
        took = time.perf_counter() - start
        torch.set_num_threads(before)
        time.sleep(0.01)  # torch's threads spin a while for more
        return took

    call()
    read()
    found: list[tuple[float, float]] = []
    reading = read()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 5:
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        after = read()
        found.append((took, 2 * block.nbytes / (reading + after)))
        reading = after
    return found


def read_bandwidth(seconds: float) -> float:
    """Bytes a second that all threads read from memory: the best of two ways to read 1 GiB."""
    block = torch.ones(1 << 28)
    ways: list[Callable[[], Any]] = [block.sum, block.max]
    return block.nbytes / min(min(timed(way, seconds / 2)) for way in ways)
