"""Cached equals computed for every family: the very logits, and what HTTP says of them.

For each family and dtype a random one of its tiny checkpoints. Three engines compute the same
requests behind the whole API: application, supervisor, messages, the loop of the engine's process
in a thread of the test. What each draws from is kept on the way to the sampler and compared by
`torch.equal`, and the answers to the last digit:

- roomy, two threads: alone; once more, from pages that are there; together, with nothing cached;
- squeezed: other pages, one thread, small chunks, preempted, planned ahead;
- restarted: the first once more over its disk, planned ahead or not.

That each of these happened is asserted of the plans. Requests that are to run together are held
back until all of them have come. Whole servers, of processes: `test_exact.py`.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import httpx
import pytest
import tiny_text
import torch
from exact_orders import DTYPES, MAX_MODEL_LEN, SEEDS, order, pool_bytes

from kernels import registry
from kvpaging.base.config import EngineOptions
from kvpaging.base.ids import SeqId
from kvpaging.engine.connection import encode_frame
from kvpaging.engine.engine import Engine
from kvpaging.engine.messages import PROTOCOL_VERSION, Hello
from kvpaging.engine.process import run
from kvpaging.execution.executor import RunningStep
from kvpaging.execution.loading import load_executor
from kvpaging.execution.local_executor import LocalExecutor
from kvpaging.execution.model_config import read_model_config
from kvpaging.execution.sampler import Drawn, Draws, Sampler
from kvpaging.scheduling.events import Arrival, Event
from kvpaging.scheduling.outputs import StepOutputs
from kvpaging.scheduling.plan import StepPlan, StepResult
from server.app import AppConfig, create_app
from server.engine_process import EngineProcess
from server.supervisor import EngineSupervisor
from server.tenants import Namespaces

NUM_REQUESTS = 4
FAMILIES = sorted({case.model_type for case in checkpoints.CASES})
Logits = dict[tuple[int, int, int], torch.Tensor]
"""Of (seed, output index, position): the row that the token there was drawn from."""

pytestmark = pytest.mark.skipif(
    not any(path.name == "native" and path.available for path in registry.describe()),
    reason="the native kernels are not there, and plain torch does not promise exactness",
)


class Watched:
    """An executor that keeps its plans, and the logits that were drawn from."""

    def __init__(self, inner: LocalExecutor):
        self.plans: list[StepPlan] = []
        self.most_held = 0
        """The most plans that were under way at once."""
        self._inner = inner
        self._num_held = 0
        self._drawing: deque[StepPlan] = deque()
        self._seeds: dict[SeqId, int] = {}
        self._logits: Logits = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def submit(self, plan: StepPlan) -> RunningStep:
        self.plans.append(plan)
        self._seeds |= {added.seq_id: added.sampling.seed for added in plan.added}
        if any(entry.sample_for for entry in plan.scheduled):
            self._drawing.append(plan)
        self._num_held += 1
        self.most_held = max(self.most_held, self._num_held)
        return _Watching(self, self._inner.submit(plan))

    def ended(self) -> None:
        self._num_held -= 1

    def draws(self, logits: torch.Tensor, draws: Draws) -> None:
        """Keep what the next plan that samples draws from."""
        plan = self._drawing.popleft()
        sampling = [entry for entry in plan.scheduled if entry.sample_for]
        assert len(sampling) == len(logits)
        for row, index, position in zip(
            draws.logit_rows.tolist(),
            draws.output_indices.tolist(),
            draws.positions.tolist(),
            strict=True,
        ):
            key = (self._seeds[sampling[row].seq_id], index, position)
            assert key not in self._logits, "a token was drawn twice"
            self._logits[key] = logits[row].clone()

    def take(self) -> Logits:
        """All since the last call. Call when nothing is under way."""
        found, self._logits = self._logits, {}
        return found


@dataclass
class _Watching:
    """A running step of `Watched`."""

    of: Watched
    inner: RunningStep

    def result(self) -> StepResult:
        self.of.ended()
        return self.inner.result()


class GatedEngine(Engine):
    """An engine that begins when as many requests have come as it waits for."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.wanted = 1
        self._come: list[Event] = []

    def step(self, events: Sequence[Event] = ()) -> StepOutputs:
        self._come += events
        if sum(isinstance(event, Arrival) for event in self._come) < self.wanted:
            return StepOutputs()
        come, self._come, self.wanted = self._come, [], 0
        return super().step(come)


class EngineThread(threading.Thread):
    """The engine process's loop in a thread, in the place of a process."""

    def __init__(self, sock: socket.socket):
        super().__init__(daemon=True)
        self.engine: GatedEngine
        self.watched: Watched
        self.num_preemptions = 0
        self._sock = sock
        self._exit_code = -1

    def run(self) -> None:
        self._exit_code = run(self._sock, self._make)
        self.num_preemptions = self.engine.stats().num_preemptions

    def _make(self, options: EngineOptions, _: object) -> GatedEngine:
        config, executor = load_executor(options)
        assert config.exact
        self.watched = Watched(executor)
        self.engine = GatedEngine(config, self.watched)
        return self.engine

    # As `EngineProcess` calls a process.

    def wait(self, timeout_s: float | None = None) -> int:
        self.join(timeout_s)
        if self.is_alive():
            raise subprocess.TimeoutExpired("the engine", timeout_s or 0.0)
        return self._exit_code

    def kill(self) -> None:
        raise AssertionError("the engine does not end")


class Api:
    """The application over an engine of its own."""

    def __init__(self, options: EngineOptions):
        self._options = options

    async def __aenter__(self) -> Api:
        ours, theirs = socket.socketpair()
        self.thread = EngineThread(theirs)
        self.thread.start()
        ours.sendall(encode_frame(Hello(PROTOCOL_VERSION, self._options)))
        process = EngineProcess(self.thread, ours)  # type: ignore[arg-type]
        self._supervisor = EngineSupervisor(lambda: process)
        await self._supervisor.start()
        await self._supervisor.ready()
        # The secret outlives a server, as that of `secret_for` does.
        config = AppConfig(served_model_name="tiny", namespaces=Namespaces(b"the operator's"))
        app = create_app(config, self._supervisor, tiny_text.text())
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", timeout=120
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._supervisor.close()
        assert self.thread.wait(0) == 0

    async def ask(self, *bodies: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
        """The answers to requests that are begun in one step."""
        self.thread.engine.wanted = len(bodies)
        answers = await asyncio.gather(
            *(self._http.post("/generate", json=body | more) for body in bodies)
        )
        for answer in answers:
            assert answer.status_code == 200, answer.text
        return [answer.json() for answer in answers]

    async def ask_each(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers to requests that run alone."""
        return [answer for body in bodies for answer in await self.ask(body)]


def cached(answers: Sequence[dict[str, Any]]) -> list[int]:
    return [answer["usage"]["cached_tokens"] for answer in answers]


def said(answers: Sequence[dict[str, Any]]) -> list[str]:
    """To the last digit: JSON writes floats so that each value has its own text."""
    return [json.dumps(answer["outputs"]) for answer in answers]


def most_together(plans: Sequence[StepPlan]) -> int:
    return max(len(plan.scheduled) for plan in plans)


def num_chunks(plans: Sequence[StepPlan]) -> int:
    """Pieces of prompts that were not the last."""
    return sum(not entry.sample_for for plan in plans for entry in plan.scheduled)


@dataclass
class Reference:
    """What the first engine drew from and said, each request alone."""

    logits: Logits
    answers: list[str]

    def check(self, logits: Logits, answers: Sequence[dict[str, Any]], why: str) -> None:
        """The same bits again, and more only where a plan was made too early."""
        assert logits.keys() >= self.logits.keys()
        for key, row in self.logits.items():
            assert torch.equal(logits[key], row), f"{why} changes logits of {key}"
        assert said(answers) == self.answers, f"{why} changes answers"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_around_a_request_changes_its_logits(
    family: str, dtype: str, seed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{family} {dtype} {seed}")
    case = rng.choice([case for case in checkpoints.CASES if case.model_type == family])
    model = tmp_path / case.name  # its name is in the report of a failure
    checkpoints.make(case, model, dtype=getattr(torch, dtype), seed=rng.getrandbits(31))
    asyncio.run(_three_engines(model, dtype, rng, monkeypatch))


async def _three_engines(
    model: Path, dtype: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_model_config(model)
    bodies = [order(rng) for _ in range(NUM_REQUESTS)]
    own_draw = Sampler.draw
    api: Api

    def draw(sampler: Sampler, logits: torch.Tensor, draws: Draws) -> Drawn:
        api.thread.watched.draws(logits, draws)
        return own_draw(sampler, logits, draws)

    monkeypatch.setattr(Sampler, "draw", draw)

    def options(page_size: int, num_pages: int, **more: Any) -> EngineOptions:
        return EngineOptions(
            str(model),
            device="cpu",
            dtype=dtype,
            page_size=page_size,
            kv_cache_memory_bytes=pool_bytes(config, page_size, num_pages, dtype),
            max_model_len=MAX_MODEL_LEN,
            **more,
        )

    page_size, disk = rng.choice([4, 8]), str(model / "pages")
    async with Api(options(page_size, 600, threads=2, disk_cache_dir=disk)) as api:
        watched = api.thread.watched
        answers = await api.ask_each(bodies)
        reference = Reference(watched.take(), said(answers))
        assert len(reference.logits) == sum(body["n"] * body["max_new_tokens"] for body in bodies)
        assert cached(answers) == [0] * NUM_REQUESTS
        assert num_chunks(watched.plans) == 0

        again = await api.ask_each(bodies)
        reference.check(watched.take(), again, "a hit")
        assert min(cached(again)) >= 24

        watched.plans.clear()
        # With a salt of their own they find nothing of what was computed before.
        together = await api.ask(*bodies, cache_salt="apart")
        reference.check(watched.take(), together, "a mate")
        assert cached(together) == [0] * NUM_REQUESTS
        assert most_together(watched.plans) >= NUM_REQUESTS
        assert watched.most_held == 1
    assert api.thread.num_preemptions == 0

    small_page = rng.choice([2, 16])
    squeezed = options(
        small_page,
        -(-MAX_MODEL_LEN // small_page),
        threads=1,
        async_scheduling=True,
        max_num_seqs=4,
        max_num_batched_tokens=rng.randint(7, 23),
    )
    async with Api(squeezed) as api:
        answers = await api.ask(*bodies)
    watched = api.thread.watched
    reference.check(watched.take(), answers, "a chunk, a preemption, a thread or a plan ahead")
    assert api.thread.num_preemptions > 0
    assert num_chunks(watched.plans) > 0
    assert most_together(watched.plans) > 1
    assert watched.most_held == 2

    ahead = rng.choice([True, False])
    restarted = options(page_size, 600, threads=2, disk_cache_dir=disk, async_scheduling=ahead)
    async with Api(restarted) as api:
        answers = await api.ask(*bodies)
    watched = api.thread.watched
    reference.check(watched.take(), answers, "a page from the disk")
    assert sum(len(load.page_ids) for plan in watched.plans for load in plan.loads) > 0
    assert min(cached(answers)) >= 16
    assert watched.most_held == 1 + ahead


def test_every_family_is_among_them() -> None:
    """A family without a case would not be tested at all; see also `test_oracle.py`."""
    assert len(FAMILIES) == 10
