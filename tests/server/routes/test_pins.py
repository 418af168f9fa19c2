from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngineClient, engine_config
from http_app import Caller, make_app

from kvpaging.cache.retention import Retention
from server.keys import KeyFile

LONG = list(range(1, 41))  # two pages of 16, and a half


def test_a_prefix_is_computed_pinned_listed_and_given_up() -> None:
    client = FakeEngineClient(num_cached_tokens=16)
    http = Caller(make_app(client))
    answer = http.post("/pins", {"prompt": LONG, "ttl_s": 60, "priority": 5}).json()
    assert (answer["pages"], answer["tokens"], answer["cached_tokens"]) == (2, 32, 16)
    (seen,) = client.seen
    assert seen.retention == Retention(pin=True, ttl_s=60, priority=5)
    assert (seen.prompt_token_ids, seen.sampling.max_new_tokens) == (tuple(LONG), 1)
    listed = http.get("/pins").json()
    pin = {"id": answer["id"], "pages": 2, "tokens": 32, "computed": True, "ends_in_s": 60.0}
    assert listed == {"page_size": 16, "pins": [pin]}
    assert http.request("DELETE", f"/pins/{answer['id']}").json() == {"id": answer["id"]}
    assert client.unpinned == [answer["id"]]
    assert http.get("/pins").json()["pins"] == []


def test_messages_are_pinned_as_a_chat_begins_with_them() -> None:
    client = FakeEngineClient()
    http = Caller(make_app(client))
    messages = [{"role": "system", "content": "be brief " * 20}]
    assert http.post("/pins", {"messages": messages}).status_code == 200
    chat = {"model": "org/tiny", "messages": messages, "max_tokens": 2}
    assert http.post("/v1/chat/completions", chat).status_code == 200
    assert client.seen[0].prompt_token_ids == client.seen[1].prompt_token_ids


def test_a_tenant_sees_and_ends_its_own_pins_alone() -> None:
    client = FakeEngineClient()
    app = make_app(client, api_keys=("one", "two"))
    one, two = (Caller(app, {"Authorization": f"Bearer {key}"}) for key in ("one", "two"))
    pin_id = one.post("/pins", {"prompt": LONG}).json()["id"]
    assert len(one.get("/pins").json()["pins"]) == 1
    assert two.get("/pins").json()["pins"] == []
    answer = two.request("DELETE", f"/pins/{pin_id}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "pin_not_found")
    assert client.unpinned == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "give either prompt or messages"),
        ({"prompt": [1] * 15}, "15 tokens fill none of 16"),
        ({"prompt": LONG, "ttl_s": 0}, "ttl_s"),
        ({"prompt": LONG, "priority": 101}, "priority"),
        ({"prompt": LONG, "pin": True}, "unknown field 'pin'"),
    ],
)
def test_what_can_not_be_pinned_is_refused(body: dict[str, Any], says: str) -> None:
    client = FakeEngineClient()
    answer = Caller(make_app(client)).post("/pins", body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert not client.seen


@pytest.mark.parametrize(
    "body", [{"prompt": [1] * 15}, {"messages": [{"role": "user", "content": "x"}]}]
)
def test_a_prompt_below_a_page_can_not_be_pinned_in_any_way(body: dict[str, Any]) -> None:
    client = FakeEngineClient(config=engine_config(page_size=32, num_pages=32))
    http = Caller(make_app(client))
    error = http.post("/pins", body).json()["error"]
    assert "tokens fill none of 32" in error["message"]
    assert error["param"] == next(iter(body))
    if "prompt" in body:
        asked = {**body, "max_new_tokens": 1, "cache": {"pin": True}}
        again = http.post("/generate", asked).json()["error"]
        assert (again["message"], again["param"]) == (error["message"], "cache")


def test_a_pin_that_has_ended_is_no_success() -> None:
    answer = Caller(make_app(FakeEngineClient(forgets_pins=True))).post("/pins", {"prompt": LONG})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "pin_ended")


@pytest.mark.parametrize(
    ("keys", "most", "refused", "let_in"),
    [
        ((), None, (), (100, -100)),
        (("one",), None, (), (100,)),
        (("one", "two"), None, (1, 100), (0, -100)),
        (("one", "two"), 5, (6,), (5,)),
        ((), 5, (6,), (5,)),
    ],
)
def test_no_tenant_keeps_the_others_pages_out_by_a_priority(
    keys: tuple[str, ...], most: int | None, refused: tuple[int, ...], let_in: tuple[int, ...]
) -> None:
    client = FakeEngineClient()
    app = make_app(client, api_keys=keys, max_cache_priority=most)
    http = Caller(app, {"Authorization": "Bearer one"})
    for priority in (*refused, *let_in):
        body = {"prompt": LONG, "max_new_tokens": 1, "cache": {"priority": priority}}
        answers = [http.post("/generate", body)]
        answers.append(http.post("/pins", {"prompt": LONG, "priority": priority}))
        assert {answer.status_code for answer in answers} == {400 if priority in refused else 200}
        if priority in refused:
            errors = [answer.json()["error"] for answer in answers]
            assert [error["param"] for error in errors] == ["cache.priority", "priority"]
            assert "cache.priority may be at most" in errors[0]["message"]
    assert {request.retention.priority for request in client.seen} == set(let_in)


def test_the_operator_sees_and_ends_every_pin() -> None:
    client = FakeEngineClient()
    app = make_app(client, api_keys=("one", "two"), operator_key="boss")
    one, two, boss = (
        Caller(app, {"Authorization": f"Bearer {key}"}) for key in ("one", "two", "boss")
    )
    ids = [http.post("/pins", {"prompt": LONG}).json()["id"] for http in (one, two)]
    listed = boss.get("/cache/pins").json()
    assert [pin["id"] for pin in listed["pins"]] == ids
    assert len({pin["tenant"] for pin in listed["pins"]}) == 2
    assert one.get("/cache/pins").status_code == 403
    assert one.request("DELETE", f"/cache/pins/{ids[0]}").status_code == 403
    assert boss.request("DELETE", f"/cache/pins/{ids[1]}").json() == {"id": ids[1]}
    assert boss.request("DELETE", f"/cache/pins/{ids[1]}").status_code == 404
    assert client.unpinned == [ids[1]]


def bodies(cache: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    chat = {
        "model": "org/tiny",
        "messages": [{"role": "user", "content": "x" * 99}],
        "max_tokens": 1,
    }
    completion = {"model": "org/tiny", "prompt": "x" * 99, "max_tokens": 1}
    return [
        ("/generate", {"prompt": "x" * 99, "max_new_tokens": 1, "cache": cache}),
        ("/generate", {"inputs": "x" * 99, "parameters": {"max_new_tokens": 1, "cache": cache}}),
        ("/v1/completions", {**completion, "cache": cache}),
        ("/v1/chat/completions", {**chat, "cache": cache}),
    ]


@pytest.mark.parametrize("place", range(4))
def test_every_dialect_says_how_long_pages_stay(place: int) -> None:
    client = FakeEngineClient()
    http = Caller(make_app(client))
    path, body = bodies({"pin": True, "ttl_s": 3600, "priority": -7})[place]
    assert http.post(path, body).status_code == 200
    path, body = bodies({"store": False})[place]
    assert http.post(path, body).status_code == 200
    assert [request.retention for request in client.seen] == [
        Retention(pin=True, ttl_s=3600, priority=-7),
        Retention(store=False),
    ]


@pytest.mark.parametrize("place", range(4))
def test_every_dialect_refuses_what_it_would_overlook(place: int) -> None:
    http = Caller(make_app(FakeEngineClient()))
    for cache in ({"store": False, "pin": True}, {"keep": True}, {"ttl_s": -1}, True):
        path, body = bodies(cache)[place]  # type: ignore[arg-type]
        answer = http.post(path, body)
        assert answer.status_code in (400, 422), cache
        assert "cache" in answer.text


def test_a_tenants_own_budget_goes_before_the_one_of_all(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(0o600)

    def write(budget: str) -> None:
        path.write_text(
            f'{{"key": "k-a", "tenant": "a"{budget}}}\n{{"key": "k-b", "tenant": "b"}}\n'
            '{"key": "op", "tenant": "o", "role": "operator"}'
        )

    write(', "budget": 0.5')
    keys = KeyFile(path)
    client = FakeEngineClient()
    app = make_app(client, keys=keys, tenant_budget=10.0)
    body = {"prompt": "x", "max_new_tokens": 1}

    def bounds() -> list[int | None]:
        client.seen.clear()
        for key in ("k-a", "k-b"):
            http = Caller(app, {"Authorization": f"Bearer {key}"})
            assert http.post("/generate", body).status_code == 200
        return [request.tenant_pages for request in client.seen]

    assert bounds() == [32, 10]
    write(', "budget": 3')
    keys.reload()
    assert bounds() == [3, 10]
    write("")
    keys.reload()
    assert bounds() == [10, 10]


def test_the_budget_of_a_tenant_goes_with_each_request() -> None:
    for budget, pages in ((None, None), (0.25, 16), (10.0, 10)):
        client = FakeEngineClient()
        http = Caller(make_app(client, tenant_budget=budget))
        http.post("/generate", {"prompt": "x", "max_new_tokens": 1})
        assert [request.tenant_pages for request in client.seen] == [pages]


def test_a_server_without_room_for_pins_says_so_at_once() -> None:
    client = FakeEngineClient(
        config=engine_config(max_model_len=1024, num_pages=64, max_pinned_pages=0)
    )
    http = Caller(make_app(client))
    for path, body in (
        ("/pins", {"prompt": [1] * 40}),
        ("/generate", {"prompt": [1] * 40, "max_new_tokens": 1, "cache": {"pin": True}}),
    ):
        answer = http.post(path, body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "pin_limit_exceeded"
        assert "takes 64 of the 64 KV pages" in error["message"]
    assert not client.seen
