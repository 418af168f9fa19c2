"""Cached equals computed, over HTTP: whole servers, of processes, on tiny checkpoints.

Every family and its logits: `test_exact_families.py`. A round here draws a checkpoint of any
family, requests and limits, and asks three servers: one with room for everything, one with hardly
any (one thread, small chunks, plans made ahead, pages that do not suffice), and the first one
started again over its disk cache. What each says of a request must be the same to the last digit.
That hits, mates, chunks, preemptions and loads happened is read from usage and from the servers'
recordings, which must make the same decisions again.

`EXACT_ROUNDS=40 pytest tests/server/test_exact.py` runs as many; `EXACT_SEED` repeats one run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import checkpoints
import httpx
import pytest
import tiny_text
import torch
from exact_orders import DTYPES, MAX_MODEL_LEN, SEEDS, order, pool_bytes

from kernels import registry
from kvpaging.execution.model_config import ModelConfig, read_model_config
from kvpaging.replay.recording import read_header, read_steps
from kvpaging.replay.rerun import rerun
from kvpaging.scheduling.plan import StepPlan

COMMAND = (sys.executable, "-P", "-m", "server", "serve", "--port", "0", "--device", "cpu")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("KVPAGING_")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(path.name == "native" and path.available for path in registry.describe()),
        reason="the native kernels are not there, and plain torch does not promise exactness",
    ),
]


@dataclass
class Answer:
    """What must not differ, and what may."""

    outputs: list[dict[str, Any]]
    num_cached: int


@dataclass
class Told:
    """What a server's recording says that it did."""

    plans: list[StepPlan]
    num_preemptions: int
    num_held: int
    """The most plans that were held when another was made."""

    @property
    def num_together(self) -> int:
        """The most sequences in one step."""
        return max(len(plan.scheduled) for plan in self.plans)

    @property
    def num_chunks(self) -> int:
        """Pieces of prompts that were not the last."""
        return sum(not entry.sample_for for plan in self.plans for entry in plan.scheduled)

    @property
    def num_loaded(self) -> int:
        """Pages that were asked of the disk."""
        return sum(len(load.page_ids) for plan in self.plans for load in plan.loads)


class Server:
    """A server that records, until `told` ends it."""

    def __init__(self, model: Path, record: Path, *flags: str):
        self._record = record
        self.process = subprocess.Popen(
            [*COMMAND, "--model", str(model), "--record", str(record), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRONMENT,
        )
        assert self.process.stdout is not None
        lines, found = [], None
        while found is None:
            lines.append(self.process.stdout.readline())
            assert lines[-1], "it ended before it was ready: " + "".join(lines)
            found = re.search(r"address +(http://\S+)", lines[-1])
        self._url = found[1]
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def ask(self, body: dict[str, Any], **more: Any) -> Answer:
        response = httpx.post(f"{self._url}/generate", json=body | more, timeout=600)
        return answered(response.status_code, response.content)

    def ask_all(self, bodies: Sequence[dict[str, Any]], **more: Any) -> list[Answer]:
        """All at once: each is sent before an answer is read, on a connection that was open."""
        address = self._url.removeprefix("http://")
        with contextlib.ExitStack() as stack:
            connections = [
                stack.enter_context(contextlib.closing(HTTPConnection(address, timeout=600)))
                for _ in bodies
            ]
            for connection in connections:
                connection.connect()
            for connection, body in zip(connections, bodies, strict=True):
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/generate", json.dumps(body | more), headers)
            return [answered(*whole(connection)) for connection in connections]

    def num_preemptions(self) -> int:
        """So far."""
        text = httpx.get(f"{self._url}/metrics", timeout=600).text
        found = re.search(r"^kvpaging_num_preemptions_total (\S+)", text, re.MULTILINE)
        assert found is not None
        return int(float(found[1]))

    def told(self) -> Told:
        self.process.terminate()
        assert self.process.wait(600) == 0
        plans: list[StepPlan] = []
        outcome = rerun(self._record, on_plan=plans.append)
        assert outcome.first_difference is None, "the recording decides otherwise now"
        with self._record.open("rb") as file:
            read_header(file.readline())
            num_held = max(step.num_held for step in read_steps(file))
        return Told(plans, outcome.num_preemptions, num_held)


def whole(connection: HTTPConnection) -> tuple[int, bytes]:
    """The status and the body of its answer."""
    response = connection.getresponse()
    return response.status, response.read()


def answered(status: int, content: bytes) -> Answer:
    assert status == 200, content
    answer = json.loads(content)
    return Answer(answer["outputs"], answer["usage"]["cached_tokens"])


@contextlib.contextmanager
def serving(model: Path, record: Path, *flags: str) -> Iterator[Server]:
    server = Server(model, record, *flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


def pool(model: ModelConfig, page_size: int, num_pages: int, dtype: str) -> tuple[str, ...]:
    """Flags for a pool of so many pages."""
    num_bytes = pool_bytes(model, page_size, num_pages, dtype)
    return "--page-size", str(page_size), "--kv-cache-memory", str(num_bytes)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_three_servers_say_the_same(dtype: str, seed: str, tmp_path: Path) -> None:
    rng = random.Random(f"{dtype} {seed}")
    case = rng.choice(checkpoints.CASES)
    model = tmp_path / case.name  # its name is in the report of a failure
    checkpoints.make(case, model, dtype=getattr(torch, dtype), seed=rng.getrandbits(31))
    tiny_text.byte_level().save(str(model / "tokenizer.json"))
    config = read_model_config(model)
    bodies = [order(rng) for _ in range(5)]
    page_size = rng.choice([4, 8])
    disk = ("--disk-cache", str(tmp_path / "pages"), "--max-model-len", str(MAX_MODEL_LEN))
    roomy = (*disk, *pool(config, page_size, 400, dtype), "--dtype", dtype)

    with serving(model, tmp_path / "roomy", *roomy, "--threads", "2") as server:
        alone = [server.ask(body) for body in bodies]
        again = [server.ask(body) for body in bodies]
        # With a salt of their own they find nothing of what was computed before.
        together = [server.ask_all(bodies, cache_salt=f"apart {i}") for i in range(3)]
        told = server.told()
    assert not any(answer.num_cached for answer in itertools.chain(alone, *together))
    assert min(answer.num_cached for answer in again) >= 16
    assert told.num_together > 1
    assert (told.num_chunks, told.num_preemptions, told.num_held) == (0, 0, 0)
    assert said(alone) == said(again), "a hit changes bits"
    for answers in together:
        assert said(alone) == said(answers), "mates change bits"

    small_page = rng.choice([2, 16])
    small = (
        *("--threads", "1", "--async-scheduling", "--max-model-len", str(MAX_MODEL_LEN)),
        *("--max-num-seqs", "4", "--max-num-batched-tokens", str(rng.randint(7, 23))),
        *(*pool(config, small_page, -(-MAX_MODEL_LEN // small_page), dtype), "--dtype", dtype),
    )
    with serving(model, tmp_path / "small", *small) as server:
        squeezed = server.ask_all(bodies)
        rounds = 1
        # On a busy machine they may have come one after the other.
        while server.num_preemptions() == 0 and rounds < 20:
            assert said(server.ask_all(bodies, cache_salt=f"{rounds}")) == said(squeezed)
            rounds += 1
        told = server.told()
    assert told.num_preemptions > 0
    assert told.num_chunks > 0
    assert told.num_together > 1
    assert told.num_held == 1
    assert said(alone) == said(squeezed), (
        "chunks, preemption, one thread or planning ahead change bits"
    )

    ahead = rng.choice(["--async-scheduling", "--no-async-scheduling"])
    with serving(model, tmp_path / "restarted", *roomy, ahead) as server:
        loaded = server.ask_all(bodies)
        told = server.told()
    assert told.num_loaded > 0
    assert max(answer.num_cached for answer in loaded) >= 16
    assert told.num_held == (ahead == "--async-scheduling")
    assert said(alone) == said(loaded), "pages from the disk change bits"


def said(answers: Sequence[Answer]) -> list[str]:
    """To the last digit: JSON writes floats so that each value has its own text."""
    return [json.dumps(answer.outputs) for answer in answers]
