"""OpenAI's dialect, as the `openai` package reads it from a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import tiny_text
from fake_engine import FakeEngineClient, echo, engine_config, script
from http_app import MODEL, Caller, events, listening, make_app
from pydantic import TypeAdapter

from server.app import AppConfig, create_app
from server.schemas.openai import (
    ChatCompletionChunk,
    ChatCompletionResponse,
    CompletionResponse,
    ModelList,
)
from server.sse import LARGE_FRAME_BYTES, StreamLimits
from server.text import Text, Tokenizer

PROMPT = "The quick brown fox"
MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]},
]
RENDERED = "<bos>[system] Be brief.\n[user] Hi\nyou\n[assistant] "


def ids(text: str) -> list[int]:
    return tiny_text.text().tokenizer.encode(text)


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(num_cached_tokens=3)


@pytest.fixture
def http(engine: FakeEngineClient) -> Iterator[openai.OpenAI]:
    with (
        listening(make_app(engine, api_keys=("sk-1",))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="sk-1", max_retries=0) as client,
    ):
        yield client


def test_models(http: openai.OpenAI) -> None:
    assert [model.id for model in http.models.list()] == [MODEL]
    assert http.models.retrieve(MODEL).owned_by == "kvpaging"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        http.models.retrieve("gpt-4")


def test_completion(http: openai.OpenAI) -> None:
    answer = http.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, logprobs=2, n=2)
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1]
    choice = answer.choices[1]
    assert choice.finish_reason == "length"
    assert choice.text == tiny_text.text().tokenizer.decode(ids(PROMPT)[:4])
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs == [-0.5] * 4
    assert choice.logprobs.text_offset == [
        len("".join(choice.logprobs.tokens[:k])) for k in range(4)
    ]
    assert choice.logprobs.top_logprobs is not None
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    assert answer.usage is not None
    assert answer.usage.total_tokens == len(ids(PROMPT)) + 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "cc"]),
        (ids("ab"), ["ab"]),
        ([ids("ab"), ids("c")], ["ab", "cc"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_forms_of_a_prompt(
    http: openai.OpenAI, prompt: Any, texts: list[str], stream: bool
) -> None:
    assert len(ids("ab")) == 2
    options: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "echo": True}
    expected = [
        echoed + text for echoed, text in zip(["ab", "c"][: len(texts)], texts, strict=True)
    ]
    if stream:
        found = [""] * len(texts)
        for chunk in http.completions.create(**options, stream=True):
            found[chunk.choices[0].index] += chunk.choices[0].text
    else:
        found = [choice.text for choice in http.completions.create(**options).choices]
    assert found == expected


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(http: openai.OpenAI, stream: bool, max_tokens: int) -> None:
    """The prompt's tokens first, for each output; the very first has no log-probability."""
    prompts = [PROMPT, "é"]
    options: Any = {"prompt": prompts, "max_tokens": max_tokens, "n": 2, "logprobs": 2}
    found: Any = [{"text": "", "finish_reason": None} for _ in range(4)]
    if stream:
        chunks = http.completions.create(
            model=MODEL, echo=True, stream=True, stream_options={"include_usage": True}, **options
        )
        *chunks, last = chunks
        usage = last.usage
        choices = [choice for chunk in chunks for choice in chunk.choices]
    else:
        answer = http.completions.create(model=MODEL, echo=True, **options)
        usage, choices = answer.usage, answer.choices
    for choice in choices:
        whole = found[choice.index]
        whole["text"] += choice.text
        whole["finish_reason"] = choice.finish_reason
        for name, values in (choice.logprobs.to_dict() if choice.logprobs else {}).items():
            whole[name] = whole.get(name, []) + values
    assert usage is not None
    assert usage.completion_tokens == 4 * max_tokens
    for index, whole in enumerate(found):
        prompt = prompts[index // 2]
        token_ids = ids(prompt)
        num_prompt = len(token_ids)
        completion = tiny_text.text().tokenizer.decode((token_ids * 3)[:max_tokens])
        assert whole["text"] == prompt + completion
        assert whole["finish_reason"] == "length"
        scores = [None, *(-float(p) for p in range(1, num_prompt)), *([-0.5] * max_tokens)]
        assert whole["token_logprobs"] == scores
        assert [top and len(top) for top in whole["top_logprobs"]] == [
            None,
            *([2] * (num_prompt - 1 + max_tokens)),
        ]
        assert len(whole["tokens"]) == len(whole["text_offset"]) == num_prompt + max_tokens
        if prompt.isascii():
            assert "".join(whole["tokens"]) == whole["text"]
            starts = [len("".join(whole["tokens"][:k])) for k in range(num_prompt + max_tokens)]
            assert whole["text_offset"] == starts


def test_many_large_echoes_at_once_are_not_a_slow_client() -> None:
    prompts = [[3 + (i * k) % 200 for i in range(250)] for k in range(1, 9)]
    app = make_app(FakeEngineClient(), stream=StreamLimits(max_buffered_bytes=1 << 17))
    with (
        listening(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as http,
    ):
        chunks = http.completions.create(
            model=MODEL, prompt=prompts, echo=True, logprobs=20, max_tokens=0, stream=True
        )
        sizes = {chunk.choices[0].index: len(chunk.to_json(indent=None)) for chunk in chunks}
    assert sorted(sizes) == list(range(8))
    assert min(sizes.values()) > 4 * LARGE_FRAME_BYTES


@pytest.mark.parametrize("by_ids", [False, True])
def test_offsets_with_a_token_that_the_prompt_did_not_write(by_ids: bool) -> None:
    """A text is echoed as it was sent, token ids with the names of special tokens."""
    text = Text(Tokenizer(tiny_text.byte_level(adds_bos=True)), None)
    http = Caller(create_app(AppConfig(served_model_name=MODEL), FakeEngineClient(), text))
    prompt = text.tokenizer.encode("a<eos>b") if by_ids else "a<eos>b"
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
    [choice] = http.post("/v1/completions", body).json()["choices"]
    assert choice["text"] == ("<bos>a<eos>b" if by_ids else "a<eos>b")
    assert choice["logprobs"]["tokens"] == ["<bos>", "a", "<eos>", "b"]
    assert choice["logprobs"]["text_offset"] == ([0, 5, 6, 11] if by_ids else [0, 0, 1, 6])


def test_only_echo_with_logprobs_asks_for_them(engine: FakeEngineClient) -> None:
    http = Caller(make_app(engine))
    body = {"model": MODEL, "prompt": "ab"}
    for extra in ({}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 2}):
        assert http.post("/v1/completions", {**body, **extra}).status_code == 200
    assert [r.sampling.prompt_logprobs for r in engine.seen] == [None, None, None, 2]


def test_completion_defaults(engine: FakeEngineClient, http: openai.OpenAI) -> None:
    http.completions.create(model=MODEL, prompt="ab", extra_body={"n": None, "whatever": {}})
    assert engine.seen[0].sampling.max_new_tokens == 16


def test_chat(engine: FakeEngineClient, http: openai.OpenAI) -> None:
    answer = http.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_completion_tokens=3,
        logprobs=True,
        top_logprobs=1,
        seed=-1,
        temperature=0,
        top_p=None,
        user="me",
        extra_body={"top_k": -1},
    )
    request = engine.seen[0]
    assert list(request.prompt_token_ids) == ids(RENDERED)
    assert request.prompt_token_ids.count(tiny_text.BOS) == 1
    assert (request.sampling.seed, request.sampling.temperature) == (2**64 - 1, 0.0)
    choice = answer.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [bytes(token.bytes or []).decode() for token in choice.logprobs.content] == [
        token.token for token in choice.logprobs.content
    ]
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [1, 1, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_chat_may_fill_the_context(engine: FakeEngineClient, http: openai.OpenAI) -> None:
    answer = http.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256
    assert engine.seen[0].sampling.max_new_tokens == 256 - len(ids(RENDERED))


def test_chat_stream(http: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 5, "n": 2}
    whole = http.chat.completions.create(**options)
    chunks = list(
        http.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    *deltas, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in deltas)
    for index in range(2):
        own = [c.choices[0] for c in deltas if c.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert [choice.delta.role for choice in own[1:]] == [None] * (len(own) - 1)
        text = "".join(choice.delta.content or "" for choice in own)
        assert text == whole.choices[index].message.content
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]


def test_stop_strings(engine: FakeEngineClient, http: openai.OpenAI) -> None:
    engine.script = script(*ids("abcd"), tiny_text.EOS)
    ask = http.completions.create
    assert ask(model=MODEL, prompt="x", stop="cd").choices[0].text == "ab"
    end = ask(model=MODEL, prompt="x").choices[0]
    assert (end.text, end.finish_reason) == ("abcd", "stop")


def test_errors_have_the_classes_that_the_package_knows(
    engine: FakeEngineClient, http: openai.OpenAI
) -> None:
    ask = http.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(model="gpt-4", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_tokens=999") as too_long:
        ask(model=MODEL, prompt="x", max_tokens=999)
    assert (too_long.value.param, too_long.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.AuthenticationError):
        http.with_options(api_key="sk-2").completions.create(model=MODEL, prompt="x")
    engine.is_full = True
    with pytest.raises(openai.RateLimitError) as full:
        ask(model=MODEL, prompt="x")
    assert full.value.response.headers["retry-after"] == "3"


def test_an_error_in_a_stream_raises_in_the_package(
    engine: FakeEngineClient, http: openai.OpenAI
) -> None:
    engine.dies_after = 2
    chunks = iter(http.completions.create(model=MODEL, prompt="abc", stream=True))
    assert [next(chunks).choices[0].text, next(chunks).choices[0].text] == ["a", "b"]
    with pytest.raises(openai.APIError, match="engine process ended"):
        next(chunks)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools are not supported"),
        ({"functions": [{"name": "f"}]}, "functions are not supported"),
        ({"response_format": {"type": "json_object"}}, "'json_object' is not supported"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "20"),
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "no tools here"),
        ({"messages": [{"role": "user"}]}, "content"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "'image_url' is not supported",
        ),
        ({"max_tokens": 0}, "max_tokens must be greater than or equal to 1, not 0"),
        ({"stop": ["a"] * 33}, "32"),
        ({"stop": ""}, "stop"),
    ],
)
def test_what_we_cannot_do_is_refused(extra: dict[str, Any], words: str) -> None:
    http = Caller(make_app(FakeEngineClient()))
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], **extra}
    response = http.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens must be at least 1 without echo"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens must be in 0..max_tokens"),
        ({"echo": True, "prompt": [1, 1 << 40]}, "prompt"),
        ({"echo": True, "prompt": [1, 99999]}, "99999"),
        ({"prompt": ["a", [1]]}, "prompt: must be"),
        ({"prompt": [True]}, "prompt: must be"),
        ({"prompt": []}, "prompt: must be"),
        ({"prompt": ["a"] * 257}, "256 prompts"),
        ({"prompt": ["a", ""]}, "empty"),
        ({"prompt": [1, 99999]}, "99999"),
    ],
)
def test_completions_that_we_cannot_do_are_refused(extra: dict[str, Any], words: str) -> None:
    engine = FakeEngineClient()
    response = Caller(make_app(engine)).post(
        "/v1/completions", {"model": MODEL, "prompt": "x", **extra}
    )
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert engine.seen == []


def test_one_prompt_that_fails_ends_the_call(engine: FakeEngineClient) -> None:
    engine.script = echo
    http = Caller(make_app(engine))
    engine.fails_after = 3
    body = {"model": MODEL, "prompt": ["ab", "cd"], "max_tokens": 9}
    assert http.post("/v1/completions", body).status_code == 503
    assert engine.open == {}


def test_a_prompt_that_can_not_be_served_starts_none_of_its_call() -> None:
    engine = FakeEngineClient(config=engine_config(max_model_len=16))
    body = {"model": MODEL, "prompt": ["a", "b" * 40], "max_tokens": 2}
    response = Caller(make_app(engine)).post("/v1/completions", body)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert engine.seen == []


def test_answers_have_exactly_the_documented_shapes() -> None:
    http = Caller(make_app(FakeEngineClient()))
    options = {"model": MODEL, "max_tokens": 3, "n": 2}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    chat = {**options, "messages": MESSAGES, "logprobs": True, "top_logprobs": 1}
    text = {**options, "prompt": ["ab", "cd"], "logprobs": 1, "echo": True}
    for path, body, whole, chunk in (
        ("/v1/chat/completions", chat, ChatCompletionResponse, ChatCompletionChunk),
        ("/v1/completions", text, CompletionResponse, CompletionResponse),
    ):
        TypeAdapter(whole).validate_json(http.post(path, body).text, strict=True)
        *chunks, done = events(http.post(path, {**body, **stream}))
        assert done == "[DONE]"
        for each in chunks:
            TypeAdapter(chunk).validate_python(each, strict=True)
    TypeAdapter(ModelList).validate_json(http.get("/v1/models").text, strict=True)


def test_a_chat_gets_one_bos_though_the_tokenizer_adds_one_too() -> None:
    tokenizer = Tokenizer(tiny_text.byte_level(adds_bos=True))
    text = Text(tokenizer, tiny_text.text().chat_template)
    engine = FakeEngineClient()
    http = Caller(create_app(AppConfig(served_model_name=MODEL), engine, text))
    http.post("/v1/chat/completions", {"model": MODEL, "messages": MESSAGES, "max_tokens": 1})
    http.post("/v1/completions", {"model": MODEL, "prompt": "Hi", "max_tokens": 1})
    for request in engine.seen:
        assert request.prompt_token_ids[0] == tiny_text.BOS
        assert request.prompt_token_ids.count(tiny_text.BOS) == 1


def test_a_model_without_a_template_says_what_to_use() -> None:
    text = Text(tiny_text.text().tokenizer, None)
    app = create_app(AppConfig(served_model_name=MODEL), FakeEngineClient(), text)
    response = Caller(app).post("/v1/chat/completions", {"model": MODEL, "messages": MESSAGES})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_chat_template"
