"""What is recorded of a live engine makes the same decisions again, page for page."""

from __future__ import annotations

import errno
import io
import random
import stat
from collections import deque
from itertools import accumulate, count
from pathlib import Path

import msgspec
import pytest
from digest_model import DigestExecutor, DigestLevels, digest_config
from retentions import RETENTIONS

from kvpaging.base.config import EngineConfig
from kvpaging.base.errors import ConfigError
from kvpaging.base.ids import RequestId
from kvpaging.cache.eviction.names import POLICIES
from kvpaging.cache.prefix_key import SharedPrefix
from kvpaging.cache.retention import Retention
from kvpaging.engine.engine import Engine
from kvpaging.replay.recording import RecordedStep, Recorder, create_file, read_steps
from kvpaging.replay.rerun import rerun
from kvpaging.replay.trace import open_trace
from kvpaging.scheduling import scheduler as scheduler_module
from kvpaging.scheduling.events import Abort, Arrival, Event, Finish, Flush, Unpin
from kvpaging.scheduling.plan import StepPlan, StepResult
from kvpaging.scheduling.request import Request, SamplingParams


class TimedExecutor(DigestExecutor):
    """The digest model with device times by lot: what is worth loading depends on them."""

    def __init__(self, config: EngineConfig, lot: random.Random, *, levels: bool = False):
        below = DigestLevels(lot, store_at_uses=(1, 2), wants_evicted=True) if levels else None
        super().__init__(config.scheduler.num_pages, config.scheduler.page_size, below)
        self._lot = lot

    def run(self, plan: StepPlan) -> StepResult:
        return msgspec.structs.replace(super().run(plan), elapsed_s=self._lot.random())


def decisions(plan: StepPlan) -> object:
    """All of a plan but the tokens and what names them."""
    return (
        plan.step_id,
        plan.removed,
        [(a.seq_id, len(a.token_ids), a.num_prompt_tokens, a.page_ids) for a in plan.added],
        plan.copies,
        plan.scheduled,
        [(s.page_id, s.num_uses) for s in plan.stores],
        [(load.seq_id, load.page_ids) for load in plan.loads],
    )


def live_run(
    path: Path, seed: int, policy: str, *, levels: bool, ahead: bool = False
) -> tuple[list, Engine]:
    """A random run with every kind of event; returns its plans."""
    lot = random.Random(f"{seed} {policy}")
    config = digest_config(
        num_pages=lot.randint(8, 20),
        page_size=lot.choice([1, 2, 3, 4]),
        max_num_seqs=lot.randint(2, 6),
        max_num_batched_tokens=lot.randint(6, 20),
        max_model_len=24,
        max_num_waiting=6,
        eos_token_ids=tuple(range(20)) if lot.random() < 0.5 else (),
        max_pinned_ratio=lot.choice([0.0, 0.5]),
    )
    scheduler = msgspec.structs.replace(config.scheduler, eviction_policy=policy)
    config = msgspec.structs.replace(config, scheduler=scheduler, async_scheduling=ahead)
    executor = TimedExecutor(config, lot, levels=levels)
    recorder = Recorder(create_file(path), scheduler, executor.lower_levels)
    clock = accumulate(lot.random() for _ in count())
    engine = Engine(config, executor, recorder=recorder, clock=lambda: next(clock))
    prompts: list[list[int]] = []
    names: list[str] = []
    for step in range(400):
        events: list[Event] = []
        for _ in range(lot.choice([0, 0, 0, 1, 2])):
            if prompts and lot.random() < 0.6:  # a later turn, or the same again
                prompt = [*lot.choice(prompts)[: lot.randint(1, 15)], lot.randint(1, 2)]
            else:
                prompt = [lot.randint(1, 3) for _ in range(lot.randint(1, 14))]
            name = lot.choice(names) if names and lot.random() < 0.1 else f"{step}-{len(names)}"
            names.append(name)
            sampling = SamplingParams(
                max_new_tokens=lot.randint(1, 9),
                seed=0,
                temperature=-1.0 if lot.random() < 0.05 else 0.0,  # some are refused
            )
            request = Request(
                RequestId(name),
                tuple(prompt),
                sampling,
                n=lot.choice([1, 1, 1, 2]),
                priority=lot.choice([0, 0, 1]),
                namespace=lot.choice([b"a", b"b"]),
                shared=lot.choice([None, SharedPrefix(b"all", min(8, len(prompt)))]),
                tenant=lot.choice(["a", "b"]),
                tenant_pages=lot.choice([None, None, 6, 9]),
                retention=lot.choice(RETENTIONS),
                is_idle=lot.random() < 0.1,
            )
            if lot.random() < 0.05:
                executor.failing.add(request.prompt_token_ids)
            events.append(Arrival(request))
        if names and lot.random() < 0.1:
            events.append(Abort(RequestId(lot.choice(names[-5:]))))
        if names and lot.random() < 0.1:
            events.append(Finish(RequestId(lot.choice(names[-5:])), lot.randint(0, 1), 1))
        if names and lot.random() < 0.1:
            events.append(Unpin(RequestId(lot.choice(names))))
        if lot.random() < 0.03:
            events.append(Flush(step, lot.choice([None, "device", "digest"])))
        engine.step(events)
        prompts = [*prompts, *(row.tokens[:16] for row in executor.rows.values())][-40:]
    while engine.has_work:
        engine.step()
    engine.close()
    return [decisions(plan) for plan in executor.plans], engine


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("levels", [False, True], ids=["device", "levels"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_a_recording_makes_the_same_decisions(
    tmp_path: Path, seed: int, policy: str, levels: bool, ahead: bool
) -> None:
    path = tmp_path / "recording"
    live, engine = live_run(path, seed, policy, levels=levels, ahead=ahead)
    again: list[object] = []
    outcome = rerun(path, on_plan=lambda plan: again.append(decisions(plan)))
    assert again == live
    assert outcome.first_difference is None
    assert outcome.num_steps == len(live)
    stats = engine.stats()
    assert outcome.num_evicted_pages == stats.num_evicted_pages
    assert outcome.num_preemptions == stats.num_preemptions
    if levels:
        assert any(plan[-1] for plan in live), "nothing was loaded"
    with path.open("rb") as file:
        file.readline()
        assert any(step.num_held for step in read_steps(file)) is ahead


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("levels", [False, True], ids=["device", "levels"])
def test_hashing_in_pieces_makes_the_same_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: bool, ahead: bool
) -> None:
    path = tmp_path / "recording"
    with monkeypatch.context() as patch:
        patch.setattr(scheduler_module, "MAX_HASHED_TOKENS", 1)
        live, _ = live_run(path, 1, "lru", levels=levels, ahead=ahead)
        again: list[object] = []
        outcome = rerun(path, on_plan=lambda plan: again.append(decisions(plan)))
    assert again == live
    assert outcome.first_difference is None
    assert rerun(path).first_difference is not None, "nothing waited to be hashed"


def test_the_random_runs_exercise_what_they_claim(tmp_path: Path) -> None:
    kinds = ["aborts", "finishes", "unpins", "stops", "failures", "pages", "copies"]
    seen = dict.fromkeys(kinds, 0)
    hits = preemptions = 0
    for seed in range(8):
        path = tmp_path / f"{seed}"
        live, engine = live_run(path, seed, "lru", levels=False)
        hits += engine.stats().prefix_hit_tokens
        preemptions += engine.stats().num_preemptions
        with path.open("rb") as file:
            file.readline()
            for step in read_steps(file):
                seen["stops"] += len(step.stops)
                seen["failures"] += len(step.failures)
                seen["pages"] += len(step.pages)
                seen["aborts"] += sum("Abort" in type(e).__name__ for e in step.events)
                seen["unpins"] += sum("Unpin" in type(e).__name__ for e in step.events)
                seen["finishes"] += sum("Finish" in type(e).__name__ for e in step.events)
        seen["copies"] += sum(len(plan[3]) for plan in live)
    assert all(seen.values()), seen
    assert hits > 0
    assert preemptions > 0


def test_a_changed_recording_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    live_run(path, 0, "lru", levels=False)
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [msgspec.json.decode(line, type=RecordedStep) for line in lines[1:]]
    place, step = next((i, s) for i, s in enumerate(steps, 1) if s.events and not s.other_ends)
    lines[place] = msgspec.json.encode(msgspec.structs.replace(step, events=())) + b"\n"
    path.write_bytes(b"".join(lines))
    assert rerun(path).first_difference == step.step_id


def test_no_token_and_no_name_is_written_and_only_the_owner_may_read(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    config = digest_config()
    executor = TimedExecutor(config, random.Random(0))
    recorder = Recorder(create_file(path), config.scheduler)
    engine = Engine(config, executor, recorder=recorder)
    prompt = tuple(range(60, 72))
    sampling = SamplingParams(max_new_tokens=3, seed=12345)
    order = Request(
        RequestId("alice"), prompt, sampling, namespace=b"tenant-7", tenant="tenant-seven"
    )
    engine.step([Arrival(order)])
    while engine.has_work:
        engine.step()
    engine.close()
    text = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for secret in ("alice", "tenant", "12345", "60,61", "[60"):
        assert secret not in text
    first = msgspec.json.decode(text.splitlines()[1])["events"][0]["pages"]
    again = io.BytesIO()
    other = Recorder(again, config.scheduler)
    arrival = other._event(Arrival(order), deque())
    assert len(first) == 3
    assert set(first).isdisjoint(arrival.pages), "page names of two recordings can be compared"


class FullDisk(io.BytesIO):
    """Takes so many bytes, the last write in part."""

    def __init__(self, num_bytes: int):
        super().__init__()
        self.num_left = num_bytes
        self.num_refused = 0
        self.written = b""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.written += data[: self.num_left]
        self.num_left -= len(data)
        if self.num_left < 0:
            self.num_left = 0
            self.num_refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    def close(self) -> None:
        super().close()
        if not self.num_left:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_recording_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = digest_config()
    levels = DigestLevels(random.Random(0), store_at_uses=(1,), wants_evicted=True)
    executor = DigestExecutor(config.scheduler.num_pages, config.scheduler.page_size, levels)
    disk = FullDisk(2000)
    recorder = Recorder(disk, config.scheduler, levels)
    engine = Engine(config, executor, recorder=recorder)
    sampling = SamplingParams(max_new_tokens=9, seed=0)
    for i in range(5):
        [[done]] = engine.generate([[i + 1] * 9], sampling)
        assert done.finished is not None
    engine.close()
    engine.close()
    assert disk.num_refused == 1
    assert sum("can't be recorded" in record.message for record in caplog.records) == 1
    assert recorder.levels is not None
    assert not [*recorder.levels.answers, *recorder.levels.rooms], "nobody will take them"
    path = tmp_path / "recording"
    path.write_bytes(disk.written)
    outcome = rerun(path)
    assert outcome.num_steps > 3
    assert outcome.first_difference is None


def test_a_disk_that_is_full_at_the_start_is_told_at_the_start() -> None:
    with pytest.raises(ConfigError, match="can't be written: No space left"):
        Recorder(FullDisk(10), digest_config().scheduler)


def test_pins_that_are_over_leave_nothing_in_the_recorder(tmp_path: Path) -> None:
    config = digest_config(num_pages=64, max_pinned_ratio=0.5)
    executor = DigestExecutor(config.scheduler.num_pages, config.scheduler.page_size)
    recorder = Recorder(create_file(tmp_path / "recording"), config.scheduler)
    engine = Engine(config, executor, recorder=recorder)
    sampling = SamplingParams(max_new_tokens=1, seed=0)
    for i in range(200):
        request = Request(RequestId(f"{i}"), (1,) * 9, sampling, retention=Retention(pin=True))
        engine.step([Arrival(request)])
    assert "199" in recorder._pins
    assert len(recorder._pins) < 100


def test_files_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    for name in ("recording", "recording.1", "recording.2"):
        create_file(path).close()
        assert (tmp_path / name).exists()
    with pytest.raises(ConfigError, match="can't be written"):
        create_file(tmp_path / "missing" / "recording")


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    live, _ = live_run(path, 1, "lru", levels=False)
    path.write_bytes(path.read_bytes()[:-5])
    outcome = rerun(path)
    assert outcome.num_steps == len(live) - 1
    assert outcome.first_difference is None


def test_a_recording_is_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    config = digest_config(eos_token_ids=(), num_pages=32)
    executor = TimedExecutor(config, random.Random(0))
    engine = Engine(config, executor, recorder=Recorder(create_file(path), config.scheduler))
    [[first]] = engine.generate([[3] * 6], SamplingParams(max_new_tokens=8, seed=0))
    turn = [*[3] * 6, *first.token_ids, 5, 5]
    engine.generate([turn], SamplingParams(max_new_tokens=1, seed=0))
    engine.close()
    trace = open_trace(path)
    one, two = list(trace)
    assert trace.block_size == 4
    assert (one.num_prompt_tokens, one.num_output_tokens) == (6, 8)
    assert (two.num_prompt_tokens, two.num_output_tokens) == (16, 1)
    assert len(one.blocks) == 1
    # The last token is never computed: two pages are known to be full by then.
    assert list(two.blocks[:3]) == [*one.blocks, *one.output_blocks[:2]]
