from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngineClient, engine_config
from http_app import Caller, listening, make_app, wait_for

from kvpaging.base.errors import ConfigError
from kvpaging.cache.retention import Retention
from server.keys import KeyFile
from server.preload import Preloader, open_file
from server.schemas.preload import PreloadItem
from server.service import Service


def work_off(
    client: FakeEngineClient, begin: Callable[[Preloader], object], **config: object
) -> Preloader:
    """Let a preloader finish what `begin` gives it."""

    async def run() -> Preloader:
        service: Service = make_app(client, **config).state.service  # type: ignore[arg-type]
        begin(service.preloader)
        async with asyncio.timeout(10):
            while service.preloader.status()["state"] == "working":
                await asyncio.sleep(0.001)
        return service.preloader

    return asyncio.run(run())


def keys_file(directory: Path, *entries: dict[str, Any]) -> Path:
    path = directory / "keys"
    path.touch(0o600)
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def test_a_prefix_is_computed_in_chunks_of_idle_work_and_pinned_with_the_last(
    tmp_path: Path,
) -> None:
    client = FakeEngineClient(config=engine_config(max_model_len=2048, num_pages=256))
    prompt = [i % 9 + 1 for i in range(600)]
    item = PreloadItem.model_validate(
        {"prompt": prompt, "tenant": "t", "cache": {"pin": True, "ttl_s": 60, "priority": 3}}
    )
    own = KeyFile(keys_file(tmp_path, {"key": "k", "tenant": "t", "budget": 0.5}))
    preloader = work_off(client, lambda p: p.add([item]), tenant_budget=0.25, keys=own)
    assert [len(request.prompt_token_ids) for request in client.seen] == [256, 512, 600]
    assert all(request.is_idle and request.tenant == "t" for request in client.seen)
    assert {request.tenant_pages for request in client.seen} == {128}
    assert len({request.namespace for request in client.seen}) == 1
    kept = Retention(ttl_s=60, priority=3)
    assert [request.retention for request in client.seen] == [
        kept,
        kept,
        Retention(pin=True, ttl_s=60, priority=3),
    ]
    status = preloader.status()
    assert (status["done"], status["failed"], status["tokens"]) == (1, 0, 600)


def test_what_is_preloaded_is_what_a_request_of_that_tenant_finds() -> None:
    client = FakeEngineClient()
    messages = [{"role": "user", "content": "hello"}]
    item = {"messages": messages, "cache_salt": "s"}
    chat = {"model": "org/tiny", "messages": messages, "max_tokens": 1, "cache_salt": "s"}
    with listening(make_app(client)) as url:
        httpx.post(f"{url}/cache/preload", json={"items": [item]})
        wait_for(lambda: httpx.get(f"{url}/cache/preload").json()["done"] == 1)
        assert httpx.post(f"{url}/v1/chat/completions", json=chat).status_code == 200
    ahead, asked = client.seen
    assert ahead.prompt_token_ids == asked.prompt_token_ids
    assert ahead.namespace == asked.namespace
    assert ahead.tenant == asked.tenant


def test_bad_lines_are_told_with_file_line_and_field_and_the_others_are_computed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ahead.jsonl"
    lines = [
        json.dumps({"prompt": [1] * 20}),
        '{"prompt": ',
        "",
        json.dumps({"prompts": [1]}),
        json.dumps({"prompt": [1] * 20, "cache": {"ttl_s": -1}}),
        json.dumps({"prompt": [1] * 300}),
        json.dumps({"prompt": [2] * 20}),
    ]
    path.write_text("\n".join(lines), "utf-8")
    client = FakeEngineClient()
    preloader = work_off(client, lambda preloader: preloader.read(path))
    status = preloader.status()
    assert (status["done"], status["failed"], status["file"]) == (2, 4, None)
    assert [request.prompt_token_ids[0] for request in client.seen] == [1, 2]
    errors = "\n".join(status["errors"])
    assert f"{path}, line 2: not valid JSON" in errors
    assert f"{path}, line 4: unknown field 'prompts'; did you mean 'prompt'?" in errors
    assert f"{path}, line 5: cache.ttl_s" in errors
    assert f"{path}, line 6: the prompt's 300 tokens" in errors


def test_a_file_that_is_not_there_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        open_file(tmp_path / "none")
    with pytest.raises(ConfigError, match="is not a file"):
        open_file(tmp_path)


def test_an_engine_that_ends_under_it_is_tried_again_and_then_given_up() -> None:
    client = FakeEngineClient(dies_after=0)
    item = PreloadItem.model_validate({"prompt": [1] * 20})
    preloader = work_off(client, lambda preloader: preloader.add([item]))
    assert len(client.seen) == 3
    assert preloader.status()["failed"] == 1
    assert "the engine process ended" in preloader.status()["errors"][0]


def test_the_operator_sets_it_going_and_sees_how_far_it_is() -> None:
    client = FakeEngineClient()
    app = make_app(client, api_keys=("one", "two"), operator_key="boss")
    boss = Caller(app, {"Authorization": "Bearer boss"})
    assert boss.get("/cache/preload").json()["state"] == "idle"
    answer = boss.post("/cache/preload", {"items": [{"prompt": [1] * 20}]})
    assert answer.status_code == 200
    assert answer.json()["waiting"] == 1
    assert Caller(app, {"Authorization": "Bearer one"}).get("/cache/preload").status_code == 403
    answer = boss.post("/cache/preload", {"items": [{"prompt": [1], "cache": {"store": False}}]})
    assert "cache.store must be true" in answer.json()["error"]["message"]


def test_a_server_computes_its_file_ahead(tmp_path: Path) -> None:
    path = tmp_path / "ahead.jsonl"
    path.write_text(json.dumps({"prompt": [1] * 20}) + "\n")
    client = FakeEngineClient()
    with listening(make_app(client, preload=path)) as url:
        wait_for(lambda: httpx.get(f"{url}/cache/preload").json()["done"] == 1)
        assert 'preloaded_prefixes_total{outcome="done"} 1.0' in httpx.get(f"{url}/metrics").text
    assert client.seen[0].is_idle
