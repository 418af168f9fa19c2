"""A made-up trace of conversations, for tests and for showing what more of a trace costs."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from kvpaging.replay.trace import MOONCAKE_BLOCK_SIZE, TraceRequest


def conversations(
    num_requests: int, seed: int = 0, *, requests_per_s: float = 3.4, num_systems: int = 4
) -> Iterator[TraceRequest]:
    """Requests in order of arrival: each begins a conversation or goes on with one.

    A conversation starts with one of `num_systems` shared system prompts; each of its turns repeats
    all of the last one and adds to it. Later turns come soon or not at all, as people do.
    """
    lot = random.Random(seed)
    ids = count()
    systems = [[next(ids) for _ in range(lot.randint(0, 4))] for _ in range(num_systems)]
    turns: list[list[int]] = []
    now_s = 0.0
    for _ in range(num_requests):
        now_s += lot.expovariate(requests_per_s)
        if turns and lot.random() < 0.5:
            age = min(int(lot.expovariate(1 / 200)), len(turns) - 1)
            blocks = turns.pop(-1 - age)
        else:
            blocks = list(lot.choice(systems))
        blocks = [*blocks, *(next(ids) for _ in range(1 + int(lot.expovariate(1 / 12))))]
        if len(blocks) < 200:
            turns.append(blocks[:-1])
        if len(turns) > 2000:
            turns.pop(0)
        num_prompt = len(blocks) * MOONCAKE_BLOCK_SIZE - lot.randrange(MOONCAKE_BLOCK_SIZE)
        yield TraceRequest(now_s, num_prompt, 1 + int(lot.expovariate(1 / 340)), blocks)


def write_mooncake(requests: Iterator[TraceRequest], path: Path) -> None:
    """Write a trace in Mooncake's format, compressed where the name ends in `.gz`."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        for request in requests:
            line = {
                "timestamp": round(request.arrival_s * 1000),
                "input_length": request.num_prompt_tokens,
                "output_length": request.num_output_tokens,
                "hash_ids": list(request.blocks),
            }
            file.write(json.dumps(line) + "\n")
