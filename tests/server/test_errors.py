"""Every error that a client can cause: its status, its body, its words; and never a 500."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngineClient, engine_config
from fastapi import FastAPI
from http_app import MODEL, Caller, make_app
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from kvpaging.base.errors import BadRequest, EngineDied, Overloaded
from kvpaging.scheduling.request import SamplingParams
from server.app import AppConfig, create_app
from server.client import EngineState, ShuttingDown
from server.errors import ApiError, Dialect, answer_to
from server.schemas import REQUEST_MODELS
from server.schemas.body import parse
from server.schemas.generate import GenerateRequest
from server.schemas.openai import ChatCompletionRequest, ChatMessage, CompletionRequest
from server.schemas.tgi import TgiParameters
from server.text import Tokenizer

DEEP = b"[" * 100_000
BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "no json": (b"prompt=x", "not valid JSON"),
    "cut": (b'{"prompt": "x"', "not valid JSON"),
    "trailing": (b'{"prompt": "x"} {}', "not valid JSON"),
    "not utf-8": (b'{"prompt": "\xff\xfe"}', "not valid JSON"),
    "utf-16": ('{"prompt": "x"}'.encode("utf-16"), "not valid JSON"),
    "lone surrogate": (b'{"prompt": "\\ud800"}', "not valid JSON"),
    "nan": (b'{"prompt": "x", "temperature": NaN}', "not valid JSON"),
    "infinity": (b'{"prompt": "x", "temperature": Infinity}', "not valid JSON"),
    "too deep": (DEEP, "recursion"),
    "too long a number": (b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}", "range"),
    "a list": (b"[1]", "must be a JSON object, not a list"),
    "a text": (b'"x"', "not a text"),
    "null": (b"null", "not null"),
    "overflow": (b'{"prompt": "x", "temperature": 1e999}', "temperature must be a finite number"),
}

FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "prompt is missing"),
    ({"prompt": ""}, "prompt", "the prompt is empty"),
    ({"prompt": []}, "prompt", "the prompt is empty"),
    ({"prompt": None}, "prompt", "must be a text or a list of token ids"),
    ({"prompt": [1, "a"]}, "prompt", "must be a text or a list of token ids"),
    ({"prompt": [1, True]}, "prompt", "must be a text or a list of token ids"),
    ({"prompt": [1, 2.0]}, "prompt", "must be a text or a list of token ids"),
    ({"prompt": [-1]}, "prompt", "token id -1 is not in 0..2147483647"),
    ({"prompt": [512]}, "prompt", "token id 512 in the prompt is not in 0..511"),
    ({"prompt": [2**70]}, "prompt", "token id 1180591620717411303424 is not in 0..2147483647"),
    ({"prompt": [5] * 300}, "prompt", "300 tokens"),
    ({"prompt": "x", "max_new_tokens": 256}, "max_new_tokens", "model's length is 256"),
    ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens", "greater than or equal to 1, not 0"),
    ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens", "integer, not true"),
    ({"prompt": "x", "max_new_tokens": 5.0}, "max_new_tokens", "integer, not 5.0"),
    ({"prompt": "x", "max_new_tokens": "5"}, "max_new_tokens", 'integer, not "5"'),
    ({"prompt": "x", "min_new_tokens": 9, "max_new_tokens": 8}, "", "at most max_new_tokens (8)"),
    ({"prompt": "x", "temperature": -0.1}, "temperature", "not -0.1"),
    ({"prompt": "x", "temperature": "hot"}, "temperature", 'number, not "hot"'),
    ({"prompt": "x", "top_p": 0}, "top_p", "greater than 0, not 0"),
    ({"prompt": "x", "top_p": 1.01}, "top_p", "less than or equal to 1, not 1.01"),
    ({"prompt": "x", "top_k": -1}, "top_k", "not -1"),
    ({"prompt": "x", "top_k": 2**31}, "top_k", "less than or equal to 2147483647, not 2147483648"),
    ({"prompt": "x", "inputs": "x"}, "inputs", "give only one of prompt and inputs"),
    ({"prompt": "x", "min_p": 2}, "min_p", "not 2"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "not 0"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "'a' is not a token id"),
    ({"prompt": "x", "logit_bias": {"-1": 1}}, "logit_bias", "not a token id"),
    ({"prompt": "x", "logit_bias": {"9999": 1}}, "logit_bias", "0..511"),
    ({"prompt": "x", "logit_bias": {"²": 1}}, "logit_bias", "not a token id"),
    ({"prompt": "x", "logit_bias": [1]}, "logit_bias", "not a list"),
    ({"prompt": "x", "seed": -1}, "seed", "not -1"),
    ({"prompt": "x", "seed": 2**64}, "seed", "less than 18446744073709551616"),
    ({"prompt": "x", "n": 0}, "n", "not 0"),
    ({"prompt": "x", "n": 9}, "n", "1..8, not 9"),
    ({"prompt": "x", "n": 129}, "n", "128"),
    ({"prompt": "x", "stop": [""]}, "stop.0", "at least 1 character"),
    ({"prompt": "x", "stop": "a" * 1025}, "stop", "at most 1024 characters"),
    ({"prompt": "x", "stop": ["a"] * 33}, "stop", "at most 32 items"),
    ({"prompt": "x", "stop_token_ids": [512]}, "stop_token_ids", "0..511"),
    ({"prompt": "x", "stop_token_ids": [2**40]}, "stop_token_ids.0", "2147483647"),
    ({"prompt": "x", "logprobs": 21}, "logprobs", "20, not 21"),
    ({"prompt": "x", "logprobs": True}, "logprobs", "integer, not true"),
    ({"prompt": "x", "stream": 1}, "stream", "boolean, not 1"),
    ({"prompt": "x", "priority": 101}, "priority", "100, not 101"),
    ({"prompt": "x", "promptt": 1}, "promptt", "did you mean 'prompt'?"),
    ({"promt": "x"}, "promt", "did you mean 'prompt'?"),
    ({"prompt": "x", "max_tokens": 5}, "max_tokens", "did you mean 'max_new_tokens'?"),
    ({"prompt": "x", "zzz": 5}, "zzz", "unknown field 'zzz'"),
]


MODELS: dict[str, Any] = {
    "/generate": GenerateRequest,
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}
CHAT: dict[str, Any] = {"model": MODEL}
USER: dict[str, Any] = {"role": "user"}
OPENAI_FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    ("chat", {"messages": []}, "messages", "messages must have at least 1 items, not 0"),
    ("chat", {"messages": "hi"}, "messages", 'messages must be a list, not "hi"'),
    ("chat", {"messages": ["hi"]}, "messages.0", 'must be an object, not "hi"'),
    ("chat", {"messages": [USER]}, "messages.0.content", "is missing"),
    (
        "chat",
        {"messages": [USER | {"content": 5}]},
        "messages.0.content",
        "must be a text or a list of parts, not 5",
    ),
    (
        "chat",
        {"messages": [USER | {"content": [{"type": "text", "text": 5}]}]},
        "messages.0.content.0.text",
        "must be a text, not 5",
    ),
    ("", {"prompt": "x", "top_k": 2**64}, "top_k", "2147483647"),
    ("", {"prompt": [2**40], "echo": True}, "prompt", "token id 1099511627776 is not in"),
    ("", {"prompt": [[5], [-1]], "echo": True}, "prompt", "token id -1 is not in"),
    ("", {"prompt": ["x"] * 25}, "prompt", "at most 24 prompts fit in one call here (8 run and"),
]


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return make_app(FakeEngineClient())


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/"])
def test_bodies_that_are_no_request(app: FastAPI, name: str, path: str) -> None:
    body, words = BODIES[name]
    response = Caller(app).post(path, content=body)
    if path == "/":
        assert response.status_code == 422
        assert response.json()["error_type"] == "validation"
        return
    assert response.status_code == 400
    if name != "overflow" or path == "/generate":
        assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(("body", "param", "words"), FIELDS)
def test_fields_that_can_not_be(app: FastAPI, body: dict[str, Any], param: str, words: str) -> None:
    response = Caller(app).post("/generate", body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"]
    assert error["param"] == (param or None)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("kind", "body", "param", "words"), OPENAI_FIELDS)
def test_fields_that_can_not_be_in_openais_dialect(
    app: FastAPI, kind: str, body: dict[str, Any], param: str, words: str
) -> None:
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    response = Caller(app).post(path, CHAT | body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], words in error["message"]) == (param, True), error


@pytest.mark.parametrize("top_k", [2**31, 2**64])
def test_a_top_k_over_any_vocabulary_in_tgis_dialect(app: FastAPI, top_k: int) -> None:
    response = Caller(app).post("/", {"inputs": "x", "parameters": {"top_k": top_k}})
    assert response.status_code == 422
    assert "parameters.top_k" in response.json()["error"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"messages": [5] * 500_000}),
        ("/v1/chat/completions", CHAT | {"messages": [USER | {"content": [5] * 500_000}]}),
        ("/v1/chat/completions", CHAT | {"messages": "x", "modalities": [5] * 500_000}),
        ("/v1/completions", CHAT | {"prompt": [5] * 1_000_000 + ["x"]}),
        ("/v1/completions", CHAT | {"prompt": [-5] * 1_000_000}),
        ("/generate", {"prompt": "x", "stop_token_ids": ["x"] * 500_000}),
        ("/generate", {"prompt": "x", "logit_bias": {str(i): "x" for i in range(300_000)}}),
        ("/generate", {"prompt": "x", "logit_bias": {"9" * 1_000_000: "x"}}),
        ("/generate", {"prompt": "x", "p" * 10_000_000: 1}),
        ("/generate", {f"a{i}": 1 for i in range(200_000)}),
    ],
    ids=range(10),
)
def test_a_large_wrong_body_is_refused_soon_and_in_few_words(
    app: FastAPI, path: str, body: dict[str, Any]
) -> None:
    content = from_json(json.dumps(body))
    begin = time.process_time()
    with pytest.raises(BadRequest) as caught:
        parse(MODELS[path], content)
    assert time.process_time() - begin < 0.3
    assert len(caught.value.message) < 300
    assert len(caught.value.param or "") < 100


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "x" * 100_000}),
        ("/tokenize", {"prompt": "x" * 100_000}),
        ("/tokenize", {"inputs": "x" * 100_000}),
        ("/v1/completions", {"model": MODEL, "prompt": "x" * 100_000}),
        (
            "/v1/chat/completions",
            {"model": MODEL, "messages": [{"role": "user", "content": "x" * 100_000}]},
        ),
    ],
)
def test_a_text_that_can_not_fit_is_refused_before_it_is_read(
    app: FastAPI, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Tokenizer, "encode")
    monkeypatch.delattr(Tokenizer, "spans")
    response = Caller(app).post(path, body)
    assert response.status_code == (422 if "inputs" in body else 400)
    assert "100000 characters are over the model's length of 256 tokens" in response.text


def test_a_prompt_that_the_pool_can_not_hold() -> None:
    engine = FakeEngineClient(config=engine_config(max_model_len=4096, num_pages=16))
    response = Caller(make_app(engine)).post("/generate", {"prompt": [5] * 300})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "pool_exceeded"
    assert "19 KV pages and the pool has 16" in response.json()["error"]["message"]


def test_a_body_over_the_limit(app: FastAPI) -> None:
    http = Caller(make_app(FakeEngineClient(), max_body_bytes=1000))
    assert http.post("/generate", {"prompt": "x" * 900}).status_code == 400

    large = b'{"prompt": "x"}' + b" " * (12 << 20)
    assert Caller(app).post("/generate", content=large).status_code == 200

    async def chunks() -> Any:
        for _ in range(11):
            yield b" " * 100

    for content in (b" " * 1001, chunks()):
        response = http.post("/generate", content=content)
        assert response.status_code == 413
        assert "1000 bytes" in response.json()["error"]["message"]
        assert response.headers["connection"] == "close"


def test_bodies_that_arrive_together_are_bounded_together() -> None:
    app = make_app(FakeEngineClient(), max_body_bytes=1000, max_bodies_bytes=2500)

    async def scenario() -> tuple[list[int], httpx.Response, httpx.Response]:
        release = asyncio.Event()
        num_begun = 0

        async def slowly() -> Any:
            nonlocal num_begun
            yield b'{"prompt": "x"' + b" " * 900
            num_begun += 1  # more is asked for: the server has this
            await release.wait()
            yield b"}"

        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as http:
            first = [asyncio.create_task(http.post("/generate", content=slowly())) for _ in "ab"]
            async with asyncio.timeout(60):
                while num_begun < 2:
                    await asyncio.sleep(0)
            refused = await http.post("/generate", content=b'{"prompt": "x"}' + b" " * 900)
            release.set()
            statuses = [(await task).status_code for task in first]
            after = await http.post("/generate", content=b'{"prompt": "x"}' + b" " * 900)
        return statuses, refused, after

    statuses, refused, after = asyncio.run(scenario())
    assert (statuses, after.status_code) == ([200, 200], 200)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "too_many_bodies"
    assert refused.headers["retry-after"] == "1"


def test_a_body_that_does_not_come() -> None:
    app = make_app(FakeEngineClient(), body_timeout_s=0.05)

    async def scenario() -> int:
        sent: list[Any] = []
        first = {"type": "http.request", "body": b"{", "more_body": True}
        messages = [first]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/generate",
            "raw_path": b"/generate",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await app(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(scenario()) == 408


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/"])
def test_while_there_is_no_engine(path: str) -> None:
    engine = FakeEngineClient(config=None, state=EngineState.LOADING)
    body = SEEDS[path]
    response = Caller(make_app(engine)).post(path, body)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "loading" in response.text
    engine.state, engine.config = EngineState.DEAD, engine_config()
    assert Caller(make_app(engine)).post(path, body).status_code == 503


def test_a_tokenizer_that_can_not_be_read_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngineClient(config=engine_config(model_dir=str(tmp_path)))
    app = create_app(AppConfig(served_model_name=MODEL), engine)
    response = Caller(app).post("/generate", {"prompt": "x"})
    assert response.status_code == 500
    assert str(tmp_path) not in response.text
    assert str(tmp_path) in caplog.text


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/"])
def test_a_stalled_engine_takes_no_new_requests(path: str) -> None:
    engine = FakeEngineClient(state=EngineState.STALLED)
    response = Caller(make_app(engine)).post(path, SEEDS[path])
    assert response.status_code == 503
    assert "stalled" in response.text
    assert int(response.headers["retry-after"]) >= 1
    assert not engine.seen


def test_one_table_from_exceptions_to_answers() -> None:
    table = {
        BadRequest("m"): (400, "invalid_request_error", 422, "validation"),
        Overloaded("m", retry_after_s=0.1): (429, "rate_limit_error", 429, "overloaded"),
        EngineDied("m"): (503, "service_unavailable_error", 503, "generation"),
        ShuttingDown(): (503, "service_unavailable_error", 503, "unhealthy"),
        ApiError(413, "m", code="c"): (413, "invalid_request_error", 413, "invalid_request_error"),
        RuntimeError("secret"): (500, "server_error", 500, "incomplete_generation"),
    }
    for error, (status, kind, tgi_status, tgi_kind) in table.items():
        answer = answer_to(error)
        assert (answer.status, answer.type) == (status, kind)
        assert answer.status_in(Dialect.TGI) == tgi_status
        body: Any = answer.body_in(Dialect.TGI)
        assert body["error_type"] == tgi_kind
        assert "secret" not in body["error"]
    assert answer_to(Overloaded("m", retry_after_s=0.1)).headers == {"Retry-After": "1"}


EDGES = [sign * 2**k + d for sign in (1, -1) for k in (31, 32, 63, 64, 400) for d in (-1, 0, 1)]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([0, 1, -1, *EDGES, 1e308, 1e-320, "x", "\x00", "<eos>", MODEL]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    sorted(
        {*SamplingParams.__struct_fields__, *chain(*(m.model_fields for m in REQUEST_MODELS))}
        | {*TgiParameters.model_fields, *ChatMessage.model_fields}
    )
)
PATHS = [
    "/generate",
    "/",
    "/generate_stream",
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
]
SEEDS: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "x"},
    "/": {"inputs": "x", "parameters": {}},
    "/generate_stream": {"inputs": "x"},
    "/v1/completions": {"model": MODEL, "prompt": "x"},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "x"}]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}


class Fuzzed:
    """One loop and one client for thousands of requests."""

    def __init__(self, app: FastAPI):
        self._loop = asyncio.new_event_loop()
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", timeout=10
        )

    def post(self, path: str, content: bytes) -> httpx.Response:
        return self._loop.run_until_complete(self._http.post(path, content=content))

    def close(self) -> None:
        self._loop.run_until_complete(self._http.aclose())
        self._loop.close()


@pytest.fixture(scope="module")
def fuzzed(app: FastAPI) -> Any:
    fuzzed = Fuzzed(app)
    yield fuzzed
    fuzzed.close()


def assert_sane(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404, 422), response.text
    assert "internal_error" not in response.text
    if response.status_code != 200:
        assert response.json()["error"]


@given(
    path=st.sampled_from(PATHS),
    fields=st.dictionaries(NAMES, JSON, max_size=4),
    name=NAMES,
    value=JSON,
)
@settings(max_examples=600, deadline=None)
def test_no_field_makes_a_500(
    fuzzed: Fuzzed, path: str, fields: dict[str, Any], name: str, value: Any
) -> None:
    body = {**SEEDS[path], **fields, name: value}
    assert_sane(fuzzed.post(path, json.dumps(body).encode()))
    if "parameters" in SEEDS[path]:
        body = {"inputs": "x", "parameters": {**fields, name: value}}
        assert_sane(fuzzed.post(path, json.dumps(body).encode()))


@given(path=st.sampled_from(PATHS), content=st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_a_500(fuzzed: Fuzzed, path: str, content: bytes) -> None:
    assert_sane(fuzzed.post(path, content))


@given(path=st.sampled_from(PATHS), position=st.integers(0, 80), byte=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_no_broken_request_makes_a_500(fuzzed: Fuzzed, path: str, position: int, byte: int) -> None:
    content = bytearray(json.dumps(SEEDS[path]).encode())
    content[position % len(content)] = byte
    assert_sane(fuzzed.post(path, bytes(content)))
