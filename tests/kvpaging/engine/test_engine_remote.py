"""Two engines share one remote level: what one computed the other reuses, bit for bit."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import redis
from redis_servers import redis_server

from kvpaging.base.config import EngineOptions
from kvpaging.base.errors import ConfigError
from kvpaging.engine.engine import Engine
from kvpaging.execution.page_mover import PageMover
from kvpaging.scheduling.request import SamplingParams


def make(url: str, secret: Path | None, **changes: object) -> Engine:
    # A machine that does much else answers late, too.
    options = {"kv_cache_memory_bytes": 1 << 24, "remote_cache_deadline_s": 30.0, **changes}
    return Engine.from_options(
        EngineOptions(
            model=str(files("kvpaging") / "demo_model"),
            device="cpu",
            threads=1,
            remote_cache_url=url,
            cache_secret_file=None if secret is None else str(secret),
            **options,  # type: ignore[arg-type]
        )
    )


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no slow server: what is late there is the level's own tests' matter."""
    monkeypatch.setitem(PageMover.__init__.__kwdefaults__, "give_up_s", 60.0)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"s" * 32)
    return path


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with redis_server(tmp_path) as url:
        yield url


@pytest.mark.parametrize("kept", [None, "int8"])
def test_what_one_computed_the_other_reuses(redis_url: str, secret: Path, kept: str | None) -> None:
    rng = random.Random()
    tokens = [rng.randrange(10, 6000) for _ in range(200)]
    sampling = SamplingParams(max_new_tokens=8, seed=1, ignore_eos=True, logprobs=2)
    one = make(redis_url, secret, kv_cache_dtype=kept)
    [[cold]] = one.generate([tokens], sampling)
    one.close()
    two = make(redis_url, secret, kv_cache_dtype=kept)
    assert (two.config.kv_cache_dtype == "int8") == (kept == "int8")
    [[warm]] = two.generate([tokens], sampling)
    two.close()
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens == 192
    if two.config.exact:
        assert warm.samples == cold.samples
    stranger = secret.with_name("other")
    stranger.write_bytes(b"t" * 32)
    three = make(redis_url, stranger, kv_cache_dtype=kept)
    [[apart]] = three.generate([tokens], sampling)
    three.close()
    assert apart.num_cached_tokens == 0


def test_deadline_and_time_to_live_are_as_they_were_set(redis_url: str, secret: Path) -> None:
    engine = make(redis_url, secret, remote_cache_deadline_s=1.5, remote_cache_ttl_s=600.0)
    [setting] = engine._executor.lower_levels._settings  # type: ignore[union-attr]
    assert setting.deadline_s == 3.0
    assert setting.level._batch_deadline_s == 1.5
    engine.generate([[5] * 100], SamplingParams(max_new_tokens=2, seed=1, ignore_eos=True))
    engine.close()
    there = redis.Redis.from_url(redis_url)
    lives = [there.pttl(name) for name in there.scan_iter()]
    there.close()
    assert len(lives) == 6
    assert all(500_000 < ms <= 600_000 for ms in lives)


def test_a_remote_server_that_is_not_there_costs_no_answer(secret: Path, tmp_path: Path) -> None:
    engine = make(f"unix://{tmp_path / 'nobody'}", secret)
    sampling = SamplingParams(max_new_tokens=2, seed=1, ignore_eos=True)
    [[completion]] = engine.generate([[5] * 100], sampling)
    engine.close()
    assert completion.finished is not None
    assert len(completion.token_ids) == 2


def test_without_a_secret_it_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache_secret"):
        make("redis://127.0.0.1:1", None)
    with pytest.raises(ConfigError, match=r"secret in .*missing can't be read"):
        make("redis://127.0.0.1:1", tmp_path / "missing")


@pytest.mark.parametrize("above", ["host", "disk"])
@pytest.mark.parametrize("min_uses", [0, 1])
def test_what_has_no_room_nearer_goes_to_the_server_and_comes_back(
    redis_url: str, secret: Path, tmp_path: Path, above: str, min_uses: int
) -> None:
    page_bytes = 8 * 2 * 2 * 16 * 64 * 2
    options: dict[str, object] = {
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": 11 * page_bytes,
        "max_model_len": 160,
        "remote_cache_min_uses": min_uses,
    }
    if above == "host":
        options["host_cache_bytes"] = 12 * page_bytes
    else:
        options |= {"disk_cache_dir": str(tmp_path / "pages"), "disk_cache_bytes": 60 * page_bytes}
    rng = random.Random()
    prompts = [[rng.randrange(10, 6000) for _ in range(150)] for _ in range(14)]
    sampling = SamplingParams(max_new_tokens=4, seed=1, ignore_eos=True, logprobs=2)
    engine = make(redis_url, secret, **options)
    levels = engine._executor.lower_levels
    assert isinstance(levels, PageMover)

    def settle() -> None:
        end = time.monotonic() + 60
        while levels.num_queued_bytes or not all(way.is_idle for way in levels._overflows):
            assert time.monotonic() < end
            time.sleep(0.001)

    colds = []
    for prompt in prompts:
        colds += engine.generate([prompt], sampling)[0]
        settle()
        if len(colds) == 1 and min_uses == 0:
            assert levels.stats().levels["remote"].stored == 0, "nothing left anything yet"
        if len(colds) == 1 and min_uses == 1:
            levels._settings[-1].level.clear()  # the server lost what it was sent
    stats = levels.stats()
    assert stats.levels[above].evicted["room"] > 9
    assert stats.levels["remote"].stored > 9
    assert stats.num_dropped_pages == 0
    engine.close()
    other = make(redis_url, secret, dtype="bfloat16")
    [[warm]] = other.generate([prompts[0]], sampling)
    other.close()
    assert (colds[0].num_cached_tokens, warm.num_cached_tokens) == (0, 144)
    if engine.config.exact:
        assert warm.samples == colds[0].samples
