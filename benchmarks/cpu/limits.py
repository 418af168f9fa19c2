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


def read_bandwidth(seconds: float) -> float:
    """Bytes a second that all threads read from memory: the best of two ways to read 1 GiB."""
    block = torch.ones(1 << 28)
    ways: list[Callable[[], Any]] = [block.sum, block.max]
    return block.nbytes / min(min(timed(way, seconds / 2)) for way in ways)
