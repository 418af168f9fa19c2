"""`explain` in every dialect, whole and streamed; and cached tokens where it is not asked for."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngineClient
from http_app import MODEL, Caller, events, make_app

CHAT = [{"role": "user", "content": "Hi there"}]
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"prompt": "some text"}),
    ("/v1/completions", {"model": MODEL, "prompt": ["some text", "more of it"]}),
    ("/v1/chat/completions", {"model": MODEL, "messages": CHAT}),
    ("/generate", {"inputs": "some text", "parameters": {"details": True}}),
]
IDS = ("native", "completions", "chat", "tgi")


def asking(body: dict[str, Any], *, explain: bool, stream: bool) -> dict[str, Any]:
    body = {**body, "stream": stream}
    if "inputs" in body:
        return {**body, "parameters": {**body["parameters"], "explain": explain}}
    return {**body, "explain": explain}


def end_of(http: Caller, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What has usage and explanations: the answer, or a stream's last event."""
    answer = http.post(path, body)
    assert answer.status_code == 200, answer.text
    end = answer.json() if not body["stream"] else events(answer)[-1 - ("inputs" not in body)]
    assert isinstance(end, dict)
    return end["details"] if "inputs" in body else end


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("path", "body"), CALLS, ids=IDS)
def test_explanations_come_at_the_end(path: str, body: dict[str, Any], stream: bool) -> None:
    http = Caller(make_app(FakeEngineClient(num_cached_tokens=1)))
    end = end_of(http, path, asking(body, explain=True, stream=stream))
    prompts = body.get("prompt")
    assert len(end["explanations"]) == (len(prompts) if isinstance(prompts, list) else 1)
    for told in end["explanations"]:
        num_tokens = told["prompt_tokens"]
        missed = [
            {
                "reason": "evicted",
                "first_token": 1,
                "tokens": 1,
                "level": "disk",
                "cause": "room",
                "policy": "lru",
                "evicted_s_ago": 2.5,
            },
            {"reason": "never_seen", "first_token": 2, "tokens": num_tokens - 2},
        ]
        assert told == {
            "prompt_tokens": num_tokens,
            "cached_tokens": 1,
            "page_size": 1,
            "levels": [
                {
                    "level": "device",
                    "pages": 0,
                    "pages_left": 0,
                    "first_mismatch": {"page": 0, "token": 0},
                    "missed": [{"reason": "never_seen", "first_token": 0, "tokens": num_tokens}],
                },
                {
                    "level": "disk",
                    "pages": 1,
                    "pages_left": 0,
                    "first_mismatch": {"page": 1, "token": 1},
                    "missed": missed,
                },
            ],
            "first_mismatch": {"page": 1, "token": 1},
            "missed": missed,
            "load": {
                "pages_below": 1,
                "pages_asked": 1,
                "pages_loaded": 1,
                "load_ms": 4.0,
            },
            "recomputed": [],
        }


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("path", "body"), CALLS, ids=IDS)
def test_nobody_is_told_unasked_but_how_much_was_cached(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    http = Caller(make_app(FakeEngineClient(num_cached_tokens=3)))
    asked = asking(body, explain=False, stream=stream) | {"stream_options": {"include_usage": True}}
    if path == "/generate":
        del asked["stream_options"]
    end = end_of(http, path, asked)
    assert "explanations" not in end
    usage = end.get("usage", end)
    usage = usage.get("prompt_tokens_details", usage)
    assert usage["cached_tokens"] == 3 * (2 if isinstance(body.get("prompt"), list) else 1)


def test_recomputed_tokens_name_their_output() -> None:
    http = Caller(make_app(FakeEngineClient()))
    answer = http.post("/generate", {"prompt": "abc", "n": 2, "explain": True}).json()
    assert answer["explanations"][0]["recomputed"] == [{"output": 1, "first_token": 0, "tokens": 2}]


def test_a_stop_string_ends_the_text_and_the_explanation_still_comes() -> None:
    http = Caller(make_app(FakeEngineClient(late_steps=2)))
    parameters = {"details": True, "explain": True, "stop": ["e"]}
    body = {"inputs": "abcde", "parameters": parameters, "stream": True}
    *others, last = events(http.post("/generate", body))
    assert all(event["details"] is None for event in others)
    assert last["details"]["finish_reason"] == "stop_sequence"
    assert len(last["details"]["explanations"]) == 1


def test_tgi_has_no_place_for_it_without_details() -> None:
    http = Caller(make_app(FakeEngineClient()))
    answer = http.post("/generate", {"inputs": "x", "parameters": {"explain": True}})
    assert answer.status_code == 422
    assert "explain needs details" in answer.json()["error"]
