"""TGI's dialect, as `huggingface_hub` reads it from a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_text
from fake_engine import FakeEngineClient, script
from http_app import Caller, events, listening, make_app
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, OverloadedError, ValidationError
from pydantic import TypeAdapter

from server.schemas.tgi import TgiResponse, TgiStreamEvent

PROMPT = "The quick brown fox"


def ids(text: str) -> list[int]:
    return tiny_text.text().tokenizer.encode(text)


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient()


@pytest.fixture
def url(engine: FakeEngineClient) -> Iterator[str]:
    with listening(make_app(engine)) as url:
        yield url


@pytest.fixture(params=["", "/generate"])
def http(url: str, request: pytest.FixtureRequest) -> InferenceClient:
    return InferenceClient(base_url=url + request.param)


def test_text(http: InferenceClient) -> None:
    n = len(ids(PROMPT))
    assert http.text_generation(PROMPT, max_new_tokens=n) == PROMPT
    assert http.text_generation(PROMPT, max_new_tokens=n, return_full_text=True) == PROMPT * 2


def test_details(engine: FakeEngineClient, http: InferenceClient) -> None:
    engine.script = script(*ids("ab"), tiny_text.EOS)
    answer = http.text_generation(PROMPT, details=True, top_n_tokens=2, do_sample=True, seed=7)
    assert answer.generated_text == "ab"
    assert answer.details is not None
    assert answer.details.finish_reason == "eos_token"
    assert (answer.details.generated_tokens, answer.details.seed) == (3, 7)
    tokens = answer.details.tokens
    assert [(token.text, token.special) for token in tokens] == [
        ("a", False),
        ("b", False),
        ("<eos>", True),
    ]
    assert answer.details.top_tokens is not None
    assert [len(top) for top in answer.details.top_tokens] == [2, 2, 2]


def test_prefill(engine: FakeEngineClient, http: InferenceClient) -> None:
    options: Any = {"details": True, "max_new_tokens": 2}
    answer = http.text_generation(PROMPT, decoder_input_details=True, **options)
    prefill = answer.details.prefill
    assert [token.id for token in prefill] == ids(PROMPT)
    assert "".join(token.text for token in prefill) == PROMPT
    assert [token.logprob for token in prefill] == [
        None,
        *(-float(p) for p in range(1, len(prefill))),
    ]
    assert len(answer.details.tokens) == 2
    assert http.text_generation(PROMPT, **options).details.prefill == []
    assert engine.seen[-1].sampling.prompt_logprobs is None


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
def test_prefill_is_not_streamed(path: str) -> None:
    parameters = {"details": True, "decoder_input_details": True}
    body = {"inputs": "x", "parameters": parameters, "stream": True}
    response = Caller(make_app(FakeEngineClient())).post(path, body)
    assert response.status_code == 422
    assert "decoder_input_details is not supported for streams" in response.json()["error"]


def test_stream(engine: FakeEngineClient, http: InferenceClient) -> None:
    engine.groups = (2, 1)
    assert "".join(http.text_generation(PROMPT, stream=True, max_new_tokens=7)) == (
        http.text_generation(PROMPT, max_new_tokens=7)
    )


def test_stream_details(engine: FakeEngineClient, http: InferenceClient) -> None:
    engine.groups = (3,)
    chunks = list(
        http.text_generation(PROMPT, stream=True, details=True, max_new_tokens=5, top_n_tokens=1)
    )
    assert [chunk.index for chunk in chunks] == [1, 2, 3, 4, 5]
    assert [chunk.token.id for chunk in chunks] == (ids(PROMPT) * 2)[:5]
    assert [chunk.generated_text for chunk in chunks[:-1]] == [None] * 4
    last = chunks[-1]
    assert last.generated_text == "".join(chunk.token.text for chunk in chunks)
    assert last.details is not None
    assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 5)
    assert last.details.input_length == len(ids(PROMPT))


@pytest.mark.parametrize("groups", [(1,), (4,)])
@pytest.mark.parametrize("stream", [False, True])
def test_the_text_ends_with_the_stop_string(
    engine: FakeEngineClient, url: str, stream: bool, groups: tuple[int, ...]
) -> None:
    engine.groups = groups
    http = InferenceClient(base_url=url)
    answer: Any = http.text_generation(PROMPT, stop=["quick"], details=True, stream=stream)
    if stream:
        *_, answer = answer
    assert answer.generated_text == "The quick"
    assert answer.details.finish_reason == "stop_sequence"


def test_what_is_sampled(engine: FakeEngineClient) -> None:
    http = Caller(make_app(engine))
    for parameters in ({}, {"temperature": 0.5}, {"do_sample": True}, {"top_k": 3}, {"top_p": 0.5}):
        http.post("/", {"inputs": "x", "parameters": {"max_new_tokens": 1, **parameters}})
    assert [r.sampling.temperature for r in engine.seen] == [0.0, 0.5, 1.0, 1.0, 1.0]
    http.post("/", {"inputs": "abcdef", "parameters": {"truncate": 2}, "stream": None})
    assert list(engine.seen[-1].prompt_token_ids) == ids("abcdef")[-2:]
    assert engine.seen[-1].sampling.max_new_tokens == 128


def test_a_client_sees_errors_as_tgis(engine: FakeEngineClient, http: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="max_new_tokens=999"):
        http.text_generation(PROMPT, max_new_tokens=999)
    engine.is_full = True
    with pytest.raises(OverloadedError):
        http.text_generation(PROMPT)
    engine.is_full = False
    engine.dies_after = 2
    with pytest.raises(GenerationError, match="engine process ended"):
        list(http.text_generation(PROMPT, stream=True))


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": 5}, "inputs"),
        ({"inputs": ""}, "empty"),
        ({"inputs": "x", "parameters": []}, "parameters"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 0}}, "parameters.max_new_tokens"),
        ({"inputs": "x", "parameters": {"temperature": 0}}, "temperature"),
        ({"inputs": "x", "parameters": {"watermark": True}}, "watermark is not supported"),
        ({"inputs": "x", "parameters": {"grammar": {"type": "json"}}}, "grammar is not"),
        ({"inputs": "x", "parameters": {"adapter_id": "a"}}, "adapter_id is not"),
        ({"inputs": "x", "parameters": {"typical_p": 0.5}}, "typical_p is not"),
        ({"inputs": "x", "parameters": {"best_of": 2}}, "best_of"),
    ],
)
def test_bad_fields_are_422(path: str, body: dict[str, Any], words: str) -> None:
    response = Caller(make_app(FakeEngineClient())).post(path, body)
    assert response.status_code == 422
    answer = response.json()
    assert answer.keys() == {"error", "error_type"}
    assert answer["error_type"] == "validation"
    assert words in answer["error"]


def test_what_is_off_may_be_sent() -> None:
    parameters = {
        "watermark": False,
        "grammar": None,
        "adapter_id": None,
        "decoder_input_details": False,
        "typical_p": None,
        "best_of": 1,
        "something_new": 3,
    }
    body = {"inputs": "x", "parameters": parameters, "whatever": 1}
    assert Caller(make_app(FakeEngineClient())).post("/generate", body).status_code == 200


def test_answers_have_exactly_the_documented_shapes() -> None:
    http = Caller(make_app(FakeEngineClient()))
    body: Any = {"inputs": "ab", "parameters": {"details": True, "top_n_tokens": 1}}
    prefill = {**body, "parameters": {**body["parameters"], "decoder_input_details": True}}
    for each in (body, prefill):
        TypeAdapter(TgiResponse).validate_json(http.post("/", each).text, strict=True)
    chunks = events(http.post("/generate_stream", body))
    assert len(chunks) == 128
    for chunk in chunks:
        TypeAdapter(TgiStreamEvent).validate_python(chunk, strict=True)


def test_info_and_tokenize() -> None:
    http = Caller(make_app(FakeEngineClient()))
    assert http.get("/info").json()["max_total_tokens"] == 256
    spans = http.post("/tokenize", {"inputs": "The dog é"}).json()
    assert "".join(span["text"] for span in spans) == "The dog é"
    assert [span["id"] for span in spans] == ids("The dog é")
    assert http.post("/tokenize", {"inputs": 1}).json()["error_type"] == "validation"
