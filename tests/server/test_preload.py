from __future__ import annotations

import asyncio
import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngineClient, engine_config
from http_app import Caller, listening, make_app, wait_for

from kvpaging.base.errors import ConfigError, Overloaded
from kvpaging.cache.retention import Retention
from server.keys import KeyFile
from server.preload import MAX_LOGGED, Preloader, open_file
from server.schemas.preload import PreloadItem
from server.service import Service


def work_off(
    client: FakeEngineClient, begin: Callable[[Preloader], object], **config: object
) -> Preloader:
    """Let a preloader finish what `begin` gives it."""

    async def run() -> Preloader:
        service: Service = make_app(client, **config).state.service  # type: ignore[arg-type]
        begin(service.preloader)
        async with asyncio.timeout(60):
            while service.preloader.status()["state"] == "working":
                await asyncio.sleep(0.001)
        return service.preloader

    return asyncio.run(run())


def keys_file(directory: Path, *entries: dict[str, Any]) -> Path:
    path = directory / "keys"
    path.touch(0o600)
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def keys_of(directory: Path, *tenants: str) -> KeyFile:
    return KeyFile(keys_file(directory, *({"key": name, "tenant": name} for name in tenants)))


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
        '{"prompt": "\\ud800 and more"}',
        "[" * 100_000,
        "[1]",
        json.dumps({"prompt": [2] * 20}),
    ]
    path.write_text("\n".join(lines), "utf-8")
    client = FakeEngineClient()
    preloader = work_off(client, lambda preloader: preloader.read(path))
    status = preloader.status()
    assert (status["done"], status["failed"], status["file"]) == (2, 7, None)
    assert [request.prompt_token_ids[0] for request in client.seen] == [1, 2]
    errors = "\n".join(status["errors"])
    assert f"{path}, line 2: the line is not valid JSON" in errors
    assert f"{path}, line 4: unknown field 'prompts'; did you mean 'prompt'?" in errors
    assert f"{path}, line 5: cache.ttl_s" in errors
    assert f"{path}, line 6: the prompt's 300 tokens" in errors
    assert f"{path}, line 8: the line is not valid JSON: recursion limit" in errors
    assert f"{path}, line 9: the line must be a JSON object, not a list" in errors


@pytest.mark.parametrize("ends", [{"fails_after": 0}, {"crashes_after": 0}])
def test_what_failed_is_not_counted_as_computed(ends: dict[str, int]) -> None:
    client = FakeEngineClient(**ends)
    items = [PreloadItem.model_validate({"prompt": [i] * 20}) for i in (1, 2)]
    status = work_off(client, lambda preloader: preloader.add(items)).status()
    assert (status["done"], status["failed"], status["tokens"]) == (0, 2, 0)
    says = "its logits were not finite" if "fails_after" in ends else "(ZeroDivisionError)"
    assert all(says in error and "secret" not in error for error in status["errors"])


class BadDisk(io.BytesIO):
    def readline(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise OSError(errno.EIO, "Input/output error")
        return super().readline(size)


def test_a_file_that_can_be_read_no_further_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = json.dumps({"prompt": [1] * 20}).encode() + b"\n"
    monkeypatch.setattr("server.preload.open_file", lambda path: BadDisk(line * 3))
    status = work_off(FakeEngineClient(), lambda preloader: preloader.read(tmp_path)).status()
    assert (status["done"], status["failed"], status["file"]) == (1, 1, None)
    assert "line 2: Input/output error; the rest is not read" in status["errors"][0]


def test_many_bad_lines_hold_nobody_up_and_do_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ahead.jsonl"
    path.write_text("no\n" * 3000)

    async def run() -> tuple[int, Preloader]:
        service: Service = make_app(FakeEngineClient()).state.service
        service.preloader.read(path)
        num_turns = 0
        while service.preloader.status()["state"] == "working":
            num_turns += 1
            await asyncio.sleep(0)
        return num_turns, service.preloader

    num_turns, preloader = asyncio.run(run())
    assert preloader.status()["failed"] == 3000
    assert num_turns >= 3000, "somebody waited for more than a line"
    told = [record for record in caplog.records if record.name == "server.preload"]
    assert len([record for record in told if record.levelname == "WARNING"]) == MAX_LOGGED + 1


def test_for_a_tenant_that_no_key_stands_for_nothing_is_computed(tmp_path: Path) -> None:
    path = tmp_path / "ahead.jsonl"
    asked = ["a", "who", None]
    path.write_text("".join(json.dumps({"prompt": [1] * 20, "tenant": t}) + "\n" for t in asked))
    client = FakeEngineClient()
    status = work_off(client, lambda p: p.read(path), keys=keys_of(tmp_path, "a", "b")).status()
    assert [request.tenant for request in client.seen] == ["a"]
    assert "line 2: no API key stands for the tenant 'who'" in status["errors"][0]
    assert "line 3: say for which of the 2 tenants" in status["errors"][1]
    status = work_off(client, lambda p: p.read(path), keys=keys_of(tmp_path, "a")).status()
    assert [request.tenant for request in client.seen] == ["a"] * 3, "there is one tenant"
    boss = Caller(
        make_app(client, keys=keys_of(tmp_path, "a", "b"), operator_key="boss"),
        {"Authorization": "Bearer boss"},
    )
    answer = boss.post("/cache/preload", {"items": [{"prompt": [1] * 20, "tenant": "who"}]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tenant")


def test_what_waits_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.preload.MAX_WAITING_BYTES", 1000)
    big = PreloadItem.model_validate({"prompt": "x" * 900})
    small = PreloadItem.model_validate({"prompt": "x" * 5})

    def begin(preloader: Preloader) -> None:
        preloader.add([big, big])  # alone, whatever its size
        with pytest.raises(Overloaded, match="1000 bytes may"):
            preloader.add([small])

    preloader = work_off(FakeEngineClient(), begin)
    assert preloader.status()["done"] + preloader.status()["failed"] == 2
    assert preloader._num_bytes == 0


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
    app = make_app(client, api_keys=("one",), operator_key="boss")
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
