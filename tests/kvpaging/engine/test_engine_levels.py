"""The levels under a real model: which weights made a page, when it goes where, and back again."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpaging.base.config import EngineOptions
from kvpaging.base.evictions import EvictionCause
from kvpaging.base.ids import RequestId
from kvpaging.cache.explanation import MissReason
from kvpaging.cache.prefix_key import root_key
from kvpaging.engine.engine import Completion, Engine
from kvpaging.execution import page_mover
from kvpaging.execution.page_mover import PageMover
from kvpaging.levels import segment
from kvpaging.levels.codec import HEADER_BYTES, read_header
from kvpaging.levels.disk import DiskLevel
from kvpaging.levels.level import StoredPage
from kvpaging.replay.rerun import rerun
from kvpaging.scheduling.events import Arrival, Event
from kvpaging.scheduling.request import Request, SamplingParams

PAGE_BYTES = 8 * 2 * 2 * 16 * 64 * 2
SAMPLING = SamplingParams(max_new_tokens=4, seed=7, ignore_eos=True, logprobs=2)


@contextmanager
def engine(model: Path, num_pages: int = 64, **options: object) -> Iterator[Engine]:
    made = Engine.from_options(
        EngineOptions(
            model=str(model),
            device="cpu",
            dtype="bfloat16",
            threads=1,
            kv_cache_memory_bytes=(num_pages + 1) * PAGE_BYTES,
            **options,  # type: ignore[arg-type]
        )
    )
    try:
        yield made
    finally:
        made.close()


def mover(engine: Engine) -> PageMover:
    levels = engine._executor.lower_levels
    assert isinstance(levels, PageMover)
    return levels


def settled(engine: Engine) -> dict[str, int]:
    """Pages in each level once all is written."""
    levels, end = mover(engine), time.monotonic() + 60
    while levels.num_queued_bytes:
        assert time.monotonic() < end
        time.sleep(0.001)
    return {name: stats.num_pages or 0 for name, stats in levels.stats().levels.items()}


def ask(engine: Engine, tokens: list[int]) -> Completion:
    [[completion]] = engine.generate([tokens], SAMPLING)
    return completion


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(str(files("kvpaging") / "demo_model"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def prompts() -> Callable[[int], list[int]]:
    rng = random.Random()
    return lambda length: [rng.randrange(10, 6000) for _ in range(length)]


def roots_on_disk(directory: Path) -> set[bytes]:
    """Of all whole pages in the segments."""
    found = set()
    for path in directory.glob("*.pages"):
        for entry in segment.scan(path, 0):
            found.add(read_header(segment.read(path, entry.offset, HEADER_BYTES)).root)
    return found


def test_weights_swapped_in_place_find_nothing_and_the_old_pages_age_out(
    model: Path, tmp_path: Path, prompts: Callable[[int], list[int]]
) -> None:
    tokens, disk = prompts(100), tmp_path / "pages"
    options = {"disk_cache_dir": str(disk), "disk_cache_bytes": 40 * PAGE_BYTES}
    with engine(model, **options) as first:
        old_root = root_key(first.config.numerics_identity)
        before = ask(first, tokens)
    with engine(model, **options) as again:
        assert ask(again, tokens).num_cached_tokens == 96
    assert roots_on_disk(disk) == {old_root}
    # One bit of one weight, in the same file.
    path = model / "model.safetensors"
    weights = load_file(path)
    name = sorted(name for name in weights if name.endswith("down_proj.weight"))[-1]
    weights[name].view(torch.int16)[5, 7] ^= 1
    save_file(weights, path, metadata={"format": "pt"})
    with engine(model, **options) as swapped:
        assert root_key(swapped.config.numerics_identity) != old_root
        stats = mover(swapped).stats().levels["disk"]
        assert stats.num_pages == 6
        order = Request(RequestId("why"), tuple(tokens), SAMPLING, explain=True)
        events: list[Event] = [Arrival(order)]
        told: list[tuple[MissReason, int]] = []
        while events or swapped.has_work:
            for output in swapped.step(events).outputs:
                if output.finished is not None and output.finished.explanation is not None:
                    runs = output.finished.explanation.missed
                    told = [(run.reason, run.num_tokens) for run in runs]
            events = []
        assert told == [(MissReason.OTHER_SETTINGS, 96), (MissReason.BELOW_PAGE, 4)]
        after = ask(swapped, prompts(100))
        assert after.num_cached_tokens == 0
        assert mover(swapped).stats().levels["disk"].hits == 0
        for _ in range(10):
            ask(swapped, prompts(100))
        settled(swapped)
        assert old_root not in roots_on_disk(disk)
        assert mover(swapped).stats().levels["disk"].evicted["room"] >= 6
    assert len(before.samples) == len(after.samples) == 4


def test_what_waits_to_go_down_is_there_after_an_orderly_end(
    model: Path,
    tmp_path: Path,
    prompts: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page_mover, "STEP_BYTES", 2 * PAGE_BYTES)
    store = DiskLevel.store

    def slow(level: DiskLevel, pages: Sequence[StoredPage], deadline_s: float) -> int:
        time.sleep(0.05)
        return store(level, pages, deadline_s)

    monkeypatch.setattr(DiskLevel, "store", slow)

    def cached_after(name: str, tokens: list[int], end: Callable[[Engine], None]) -> int:
        """What a second engine finds when the first one ends after a prompt's first token."""
        options = {"disk_cache_dir": str(tmp_path / name)}
        with engine(model, **options) as first:
            events: list[Event] = [Arrival(Request(RequestId("x"), tuple(tokens), SAMPLING))]
            while not first.step(events).outputs:
                events = []
            end(first)
        with engine(model, **options) as second:
            return ask(second, tokens).num_cached_tokens

    tokens = prompts(300)
    assert cached_after("told", tokens, Engine.store_rest) == 288
    assert cached_after("not told", tokens, lambda engine: None) < 288


def test_pages_go_to_each_level_after_as_many_uses_as_it_is_set_to(
    model: Path, tmp_path: Path, prompts: Callable[[int], list[int]]
) -> None:
    options: dict[str, object] = {
        "host_cache_bytes": 1 << 24,
        "host_cache_min_uses": 1,
        "disk_cache_dir": str(tmp_path / "pages"),
        "disk_cache_min_uses": 2,
    }
    tokens, once = prompts(100), prompts(60)
    with engine(model, **options) as it:
        ask(it, once)
        ask(it, tokens)
        assert settled(it) == {"host": 9, "disk": 0}
        ask(it, tokens)
        assert settled(it) == {"host": 9, "disk": 6}
        ask(it, tokens)
        assert settled(it) == {"host": 9, "disk": 6}
        assert mover(it).stats().levels["disk"].stores == 6, "the third use says nothing new"
    options["host_cache_min_uses"] = 2
    with engine(model, **options) as it:
        ask(it, tokens)  # found on disk: somebody computed it, and now it is used again
        assert settled(it) == {"host": 6, "disk": 6}


def test_what_is_evicted_goes_down_level_by_level_and_comes_back_the_same(
    model: Path, tmp_path: Path, prompts: Callable[[int], list[int]]
) -> None:
    options = {
        "host_cache_bytes": 12 * PAGE_BYTES,
        "disk_cache_dir": str(tmp_path / "pages"),
        "disk_cache_min_uses": 0,
        "disk_cache_compress": True,
        "max_model_len": 160,
    }
    tokens = prompts(150)
    with engine(model, num_pages=10, **options) as it:
        cold = ask(it, tokens)
        assert settled(it) == {"host": 0, "disk": 0}
        ask(it, prompts(150))
        assert settled(it) == {"host": 9, "disk": 0}
        ask(it, prompts(150))
        ask(it, prompts(150))
        pages = settled(it)
        assert 0 < pages["host"] <= 12
        assert pages["disk"] >= 9
        warm = ask(it, tokens)
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 144)
    if it.config.exact:
        assert warm.samples == cold.samples


def test_what_every_request_begins_with_stays_on_a_disk_that_others_turn_over(
    model: Path, tmp_path: Path, prompts: Callable[[int], list[int]]
) -> None:
    """The device answers it each time; a kill, and it is on the disk before each one's own part."""
    options: dict[str, object] = {
        "disk_cache_dir": str(tmp_path / "pages"),
        "disk_cache_bytes": 60 * PAGE_BYTES,
        "max_model_len": 480,
    }
    system = prompts(20 * 16)
    with engine(model, num_pages=60, **options) as it:
        for i in range(20):
            tokens = system + prompts(6 * 16 + 3)
            assert ask(it, tokens).num_cached_tokens == (len(system) if i else 0)
            settled(it)
        assert mover(it).stats().levels["disk"].loads == 0
        assert mover(it).stats().levels["disk"].evicted["room"] > 40
        left = tmp_path / "left"
        shutil.copytree(tmp_path / "pages", left)
    with engine(model, **options | {"disk_cache_dir": str(left)}) as again:
        assert ask(again, tokens).num_cached_tokens == len(system) + 6 * 16


def test_what_the_disk_lost_goes_there_again_when_it_is_used_on_the_device(
    model: Path, tmp_path: Path, prompts: Callable[[int], list[int]]
) -> None:
    with engine(model, disk_cache_dir=str(tmp_path / "pages"), record=str(tmp_path / "r")) as it:
        tokens = prompts(100)
        ask(it, tokens)
        assert settled(it) == {"disk": 6}
        mover(it)._settings[0].level.clear()
        assert settled(it) == {"disk": 0}
        for _ in range(50):  # what is lost is known to the next step, and goes with it
            assert ask(it, [*tokens, 7]).num_cached_tokens == 96
            if settled(it) == {"disk": 6}:
                break
        assert settled(it) == {"disk": 6}
        stores = mover(it).stats().levels["disk"].stores
        ask(it, [*tokens, 7])
        assert settled(it) == {"disk": 6}
        assert mover(it).stats().levels["disk"].stores == stores
    found = rerun(tmp_path / "r")
    assert found.first_difference is None
    assert '"PagesLost"' in (tmp_path / "r").read_text()


def test_an_explanation_says_which_level_a_page_left_last(
    model: Path, tmp_path: Path, prompts: Callable[[int], list[int]]
) -> None:
    options: dict[str, object] = {
        "disk_cache_dir": str(tmp_path / "pages"),
        "disk_cache_bytes": 20 * PAGE_BYTES,
        "max_model_len": 160,
    }
    tokens = prompts(150)
    with engine(model, num_pages=10, **options) as it:
        ask(it, tokens)
        settled(it)
        for _ in range(4):
            ask(it, prompts(150))
            settled(it)
        request = Request(RequestId("x"), tuple(tokens), SAMPLING, explain=True)
        events: list[Event] = [Arrival(request)]
        told = None
        while events or it.has_work:
            for output in it.step(events).outputs:
                told = output.finished and output.finished.explanation
            events = []
    assert told is not None
    device, disk = told.levels
    assert {run.reason for run in told.missed} == {MissReason.EVICTED, MissReason.BELOW_PAGE}
    assert {run.level for run in told.missed} == {"disk", None}
    for level in (device, disk):
        [run] = level.missed
        assert (run.num_tokens, run.cause, run.level) == (144, EvictionCause.ROOM, level.level)
    assert device.missed[0].evicted_ago_s > disk.missed[0].evicted_ago_s >= 0
