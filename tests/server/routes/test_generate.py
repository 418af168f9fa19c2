from __future__ import annotations

from typing import Any

import pytest
import tiny_text
from fake_engine import FakeEngineClient, engine_config, script
from http_app import MODEL, Caller, events, make_app
from pydantic import TypeAdapter

from server.app import AppConfig, create_app
from server.schemas.generate import GenerateEnd, GenerateEvent, GenerateResponse

TEXT = "The quick brown fox "


def ids(text: str) -> list[int]:
    return tiny_text.text().tokenizer.encode(text)


def caller(client: FakeEngineClient | None = None, **config: Any) -> Caller:
    return Caller(make_app(client or FakeEngineClient(), **config))


def test_text_in_text_out() -> None:
    n = len(ids(TEXT))
    response = caller(FakeEngineClient(num_cached_tokens=2)).post(
        "/generate", {"prompt": TEXT, "max_new_tokens": n}
    )
    answer = TypeAdapter(GenerateResponse).validate_json(response.text, strict=True)
    assert response.status_code == 200
    assert answer["model"] == MODEL
    assert answer["usage"] == {"prompt_tokens": n, "completion_tokens": n, "cached_tokens": 2}
    assert answer["outputs"] == [
        {
            "index": 0,
            "text": TEXT,
            "token_ids": ids(TEXT),
            "finish_reason": "length",
            "stop_reason": None,
            "logprobs": None,
        }
    ]
    assert answer["timings"]["ttft_ms"] > 0
    assert answer["timings"] | {"ttft_ms": 0} == {
        "queue_ms": 1.0,
        "prefill_ms": 2.0,
        "decode_ms": 3.0,
        "ttft_ms": 0,
    }


def test_token_ids_in() -> None:
    output = caller().post("/generate", {"prompt": [9, 8, 7], "max_new_tokens": 4}).json()
    assert output["outputs"][0]["token_ids"] == [9, 8, 7, 9]
    assert output["usage"]["prompt_tokens"] == 3


def test_every_field_reaches_the_engine() -> None:
    client = FakeEngineClient()
    body = {
        "prompt": [5],
        "max_new_tokens": 9,
        "min_new_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "logit_bias": {"5": -10, "6": 3.5},
        "seed": 2**64 - 1,
        "n": 2,
        "stop_token_ids": [77],
        "ignore_eos": True,
        "logprobs": 0,
        "priority": -100,
    }
    assert caller(client).post("/generate", body).status_code == 200
    request = client.seen[0]
    assert (request.n, request.priority, request.prompt_token_ids) == (2, -100, (5,))
    sampling = {
        name: getattr(request.sampling, name)
        for name in body
        if name != "prompt" and hasattr(request.sampling, name)
    }
    assert sampling == {name: value for name, value in body.items() if name in sampling} | {
        "logit_bias": ((5, -10.0), (6, 3.5)),
        "stop_token_ids": (77,),
    }
    assert len(sampling) == 14


def test_defaults() -> None:
    client = FakeEngineClient()
    http = caller(client)
    http.post("/generate", {"prompt": [5]})
    http.post("/generate", {"prompt": [5]})
    http.post("/generate", {"prompt": [5] * 200})
    first, second, long = (request.sampling for request in client.seen)
    assert (first.max_new_tokens, long.max_new_tokens) == (128, 56)
    assert (first.temperature, first.top_p, first.top_k, first.logprobs) == (1.0, 1.0, 0, None)
    assert first.seed != second.seed


def test_logprobs_are_one_entry_a_token() -> None:
    answer = caller().post("/generate", {"prompt": [5, 6], "max_new_tokens": 2, "logprobs": 2})
    assert answer.json()["outputs"][0]["logprobs"] == [
        {
            "token_id": token_id,
            "logprob": -0.5,
            "top": [
                {"token_id": token_id, "logprob": -0.5},
                {"token_id": token_id + 1, "logprob": -1.5},
            ],
        }
        for token_id in (5, 6)
    ]


def test_n_outputs() -> None:
    client = FakeEngineClient(script=lambda request, index, position: 10 + index)
    answer = caller(client).post("/generate", {"prompt": "x", "n": 3, "max_new_tokens": 2}).json()
    assert [o["token_ids"] for o in answer["outputs"]] == [[10, 10], [11, 11], [12, 12]]
    assert answer["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("body", "finish_reason", "stop_reason", "num_tokens", "text"),
    [
        ({}, "stop", 0, 4, "abc"),
        ({"ignore_eos": True, "max_new_tokens": 6}, "length", None, 6, "abc"),
        ({"stop_token_ids": [ids("b")[0]]}, "stop", ids("b")[0], 2, "a"),
        ({"stop": "c"}, "stop", "c", 3, "ab"),
        ({"stop": ["zzz", "bc"]}, "stop", "bc", 3, "a"),
        ({"stop": ["b"], "min_new_tokens": 3}, "stop", 0, 4, "abc"),
        ({"max_new_tokens": 3, "stop": ["c"]}, "stop", "c", 3, "ab"),
        ({"max_new_tokens": 2, "stop": ["bx"]}, "length", None, 2, "ab"),
    ],
)
def test_endings(
    body: dict[str, Any], finish_reason: str, stop_reason: object, num_tokens: int, text: str
) -> None:
    client = FakeEngineClient(script=script(*ids("a"), *ids("b"), *ids("c"), tiny_text.EOS))
    answer = caller(client).post("/generate", {"prompt": "x", **body}).json()
    output = answer["outputs"][0]
    assert (output["finish_reason"], output["stop_reason"]) == (finish_reason, stop_reason)
    assert (output["text"], len(output["token_ids"])) == (text, num_tokens)
    assert answer["usage"]["completion_tokens"] == num_tokens


def test_the_engine_is_told_where_text_ended() -> None:
    client = FakeEngineClient(script=script(*ids("a"), *ids("b"), *ids("c")), late_steps=3)
    answer = caller(client).post("/generate", {"prompt": "x", "stop": "b"}).json()
    assert client.finishes == [(client.seen[0].request_id, 0, 2)]
    assert answer["outputs"][0]["token_ids"] == [*ids("a"), *ids("b")]
    assert client.aborted == []


def test_stream() -> None:
    body = {"prompt": TEXT, "max_new_tokens": 3, "logprobs": 1, "stream": True, "n": 2}
    response = caller().post("/generate", body)
    *deltas, end, done = events(response)
    assert done == "[DONE]"
    TypeAdapter(GenerateEnd).validate_python(end, strict=True)
    for delta in deltas:
        TypeAdapter(GenerateEvent).validate_python(delta, strict=True)
    assert end["usage"]["completion_tokens"] == 6
    for index in range(2):
        own = [delta for delta in deltas if delta["index"] == index]
        assert [delta["finish_reason"] for delta in own] == [None, None, "length"]
        assert ["stop_reason" in delta for delta in own] == [False, False, True]
        assert [i for delta in own for i in delta["token_ids"]] == ids(TEXT)[:3]
        assert all(len(delta["logprobs"]) == 1 for delta in own)
    assert len({delta["id"] for delta in deltas} | {end["id"]}) == 1


@pytest.mark.parametrize("groups", [(1,), (2,), (3, 1), (7,)])
@pytest.mark.parametrize("stop", [["fox j"], ["never"], ["q", "quick b"], ["\ufffd"]])
def test_grouping_in_time_never_shows(groups: tuple[int, ...], stop: list[str]) -> None:
    body = {"prompt": TEXT + "😀", "stop": stop, "logprobs": 1, "seed": 1, "max_new_tokens": 30}
    plain = caller().post("/generate", body).json()
    http = caller(FakeEngineClient(groups=groups, late_steps=2))
    grouped = http.post("/generate", body).json()
    streamed = events(http.post("/generate", {**body, "stream": True}))
    assert grouped["outputs"] == plain["outputs"]
    assert grouped["usage"] == plain["usage"] == streamed[-2]["usage"]
    output, deltas = plain["outputs"][0], streamed[:-2]
    assert "".join(delta["text"] for delta in deltas) == output["text"]
    assert [i for delta in deltas for i in delta["token_ids"]] == output["token_ids"]
    assert [p for delta in deltas for p in delta["logprobs"]] == output["logprobs"]
    assert deltas[-1]["finish_reason"] == output["finish_reason"]
    assert deltas[-1]["stop_reason"] == output["stop_reason"]


def test_death_in_a_stream_is_one_error_event_and_no_end_mark() -> None:
    client = FakeEngineClient(dies_after=2)
    *deltas, last = events(caller(client).post("/generate", {"prompt": "x", "stream": True}))
    kind, body = last
    assert (kind, body["error"]["code"]) == ("error", "engine_died")
    assert len(deltas) == 2
    assert all(delta["finish_reason"] is None for delta in deltas)


def test_a_crash_in_a_stream_tells_nothing_of_its_inside() -> None:
    client = FakeEngineClient(crashes_after=1)
    response = caller(client).post("/generate", {"prompt": "x", "stream": True})
    assert events(response)[-1][1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("client", "status", "code"),
    [
        (FakeEngineClient(dies_after=0), 503, "engine_died"),
        (FakeEngineClient(fails_after=0), 503, "engine_died"),
        (FakeEngineClient(crashes_after=0), 500, "internal_error"),
        (FakeEngineClient(is_full=True), 429, "overloaded"),
    ],
)
def test_before_the_first_token_an_error_has_its_status(
    client: FakeEngineClient, status: int, code: str, stream: bool
) -> None:
    response = caller(client).post("/generate", {"prompt": "x", "stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    if status == 429:
        assert response.headers["retry-after"] == "3"


def test_pages_are_private_to_a_key_when_there_are_several() -> None:
    client = FakeEngineClient()
    app = make_app(client, api_keys=("one", "two"))
    for key in ("one", "two", "one"):
        Caller(app, {"Authorization": f"Bearer {key}"}).post("/generate", {"prompt": "x"})
    first, second, third = (request.namespace for request in client.seen)
    assert first == third != second
    assert [len(request.namespace) for request in client.seen] == [32, 32, 32]
    assert {request.shared for request in client.seen} == {None}


def test_without_text_it_is_read_from_the_engines_model(tmp_path: Any) -> None:
    tiny_text.byte_level().save(str(tmp_path / "tokenizer.json"))
    client = FakeEngineClient(config=engine_config(model_dir=str(tmp_path)))
    app = create_app(AppConfig(served_model_name=MODEL), client)
    answer = Caller(app).post("/generate", {"prompt": "abc", "max_new_tokens": 3}).json()
    assert answer["outputs"][0]["text"] == "abc"
