"""Two engines share one remote level: what one computed the other reuses, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from redis_servers import redis_server

from kvpaging.base.config import EngineOptions
from kvpaging.base.errors import ConfigError
from kvpaging.engine.engine import Engine
from kvpaging.scheduling.request import SamplingParams


def make(url: str, secret: Path | None, **changes: object) -> Engine:
    options = EngineOptions(
        model=str(files("kvpaging") / "demo_model"),
        device="cpu",
        threads=1,
        kv_cache_memory_bytes=1 << 24,
        remote_cache_url=url,
        cache_secret_file=None if secret is None else str(secret),
        **changes,  # type: ignore[arg-type]
    )
    return Engine.from_options(options)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"s" * 32)
    return path


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with redis_server(tmp_path) as url:
        yield url


def test_what_one_computed_the_other_reuses(redis_url: str, secret: Path) -> None:
    rng = random.Random()
    tokens = [rng.randrange(10, 6000) for _ in range(200)]
    sampling = SamplingParams(max_new_tokens=8, seed=1, ignore_eos=True, logprobs=2)
    one = make(redis_url, secret)
    [[cold]] = one.generate([tokens], sampling)
    one.close()
    two = make(redis_url, secret)
    [[warm]] = two.generate([tokens], sampling)
    two.close()
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens == 192
    if two.config.exact:
        assert warm.samples == cold.samples
    stranger = secret.with_name("other")
    stranger.write_bytes(b"t" * 32)
    three = make(redis_url, stranger)
    [[apart]] = three.generate([tokens], sampling)
    three.close()
    assert apart.num_cached_tokens == 0


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
