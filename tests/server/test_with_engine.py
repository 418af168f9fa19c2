"""The whole server on the demo model: dialects agree, and who leaves gives every page back."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from http_app import wait_for
from huggingface_hub import InferenceClient

PROMPT = "def read_lines(path):\n    with open(path) as file:\n"
COMMAND = (sys.executable, "-P", "-m", "server", "serve", "--port", "0")
LIMITS = ("--kv-cache-memory", "4MiB", "--max-num-seqs", "8", "--max-model-len", "512")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVPAGING_")}
    with subprocess.Popen(
        [*COMMAND, *LIMITS], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            found = None
            while found is None:
                line = process.stdout.readline()
                assert line, "it ended before it was ready"
                found = re.search(r"address +(http://\S+)", line)
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield found[1]
        finally:
            process.terminate()


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def metrics(http: httpx.Client) -> dict[str, float]:
    lines = http.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def is_idle(http: httpx.Client) -> bool:
    """Nothing runs or waits, and no page is held."""
    found = metrics(http)
    return (
        found["kvpaging_num_requests_running"] == found["kvpaging_num_requests_waiting"] == 0
        and found['kvpaging_pages{state="held"}'] == 0
    )


def num_pages(http: httpx.Client) -> float:
    return sum(v for k, v in metrics(http).items() if k.startswith("kvpaging_pages{"))


EDGES = [s * 2**k + d for s in (1, -1) for k in (0, 31, 32, 63, 64, 128) for d in (-1, 0, 1)]
EDGES += [1e-320, 1e-7, 1e38, 1e308, 0.5, -0.5]
FIELDS = "min_new_tokens temperature top_p top_k min_p repetition_penalty presence_penalty "
FIELDS += "frequency_penalty seed n logprobs priority"


@pytest.mark.parametrize("field", FIELDS.split())
def test_no_number_harms_the_engine(http: httpx.Client, field: str) -> None:
    for value in EDGES:
        body = {"prompt": "x", "max_new_tokens": 2, field: value}
        response = http.post("/generate", json=body)
        assert response.status_code in (200, 400), (value, response.text)
    assert metrics(http)["kvpaging_engine_restarts_total"] == 0


@pytest.mark.parametrize("value", EDGES)
def test_no_token_id_harms_the_engine(http: httpx.Client, value: float) -> None:
    model = http.get("/version").json()["model"]
    for path, body in (
        ("/generate", {"prompt": [value]}),
        ("/generate", {"prompt": "x", "stop_token_ids": [value]}),
        ("/generate", {"prompt": "x", "logit_bias": {str(value): 1}}),
        ("/generate", {"prompt": "x", "logit_bias": {"5": value}}),
        ("/v1/completions", {"model": model, "prompt": [value], "echo": True}),
        ("/v1/completions", {"model": model, "prompt": "x", "max_tokens": 2, "top_k": value}),
        ("/detokenize", {"tokens": [value]}),
        ("/", {"inputs": "x", "parameters": {"max_new_tokens": 2, "top_k": value}}),
        ("/", {"inputs": "x", "parameters": {"max_new_tokens": 2, "truncate": value}}),
    ):
        response = http.post(path, json=body)
        assert response.status_code in (200, 400, 422), (path, body, response.text)
    assert metrics(http)["kvpaging_engine_restarts_total"] == 0


def test_all_dialects_say_the_same(url: str, http: httpx.Client) -> None:
    model = http.get("/version").json()["model"]
    greedy: Any = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
    own = http.post("/generate", json={"prompt": PROMPT, **greedy}).json()["outputs"][0]
    ids = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    by_ids = http.post("/generate", json={"prompt": ids, **greedy}).json()["outputs"][0]
    assert by_ids == own
    assert len(own["token_ids"]) == 40
    assert (
        http.post("/detokenize", json={"tokens": own["token_ids"]}).json()["prompt"]
        == (own["text"])
    )

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        chunks = client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=40,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == own["text"]
        chat = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=5
        )
        assert chat.usage is not None
        assert 0 < chat.usage.completion_tokens <= 5

    stop = own["text"][10:16]
    cut = http.post("/generate", json={"prompt": PROMPT, **greedy, "stop": stop}).json()
    assert cut["outputs"][0]["text"] == own["text"][: own["text"].index(stop)]
    hub = InferenceClient(base_url=url)
    assert hub.text_generation(PROMPT, max_new_tokens=40, stop=[stop]) == (
        cut["outputs"][0]["text"] + stop
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_as_it_was_sampled(url: str, http: httpx.Client, stream: bool) -> None:
    """By echo and TGI's prefill, what was said of each token when it was sampled."""
    ids = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    greedy: Any = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 2}
    said = http.post("/generate", json={"prompt": ids, **greedy}).json()["outputs"][0]
    turn = [*ids, *said["token_ids"]]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        options: Any = {"echo": True, "logprobs": 2, "max_tokens": 0, "stream": stream}
        answer = client.completions.create(
            model=http.get("/version").json()["model"], prompt=turn, **options
        )
        chunks = list(answer) if stream else [answer]
    [choice] = [choice for chunk in chunks for choice in chunk.choices]
    text = http.post("/detokenize", json={"tokens": turn}).json()["prompt"]
    assert (choice.text, choice.finish_reason) == (text, "length")
    logprobs = [entry["logprob"] for entry in said["logprobs"]]
    assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.token_logprobs[len(ids) :] == logprobs
    assert [max(top.values()) for top in choice.logprobs.top_logprobs[len(ids) :]] == logprobs
    for start, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
        assert text.startswith(token, start)
    if not stream:
        assert answer.usage.completion_tokens == 0
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
    hub = InferenceClient(base_url=url)
    details: Any = {"details": True, "decoder_input_details": True, "max_new_tokens": 1}
    prefill = hub.text_generation(text, **details).details.prefill
    if [token.id for token in prefill] == turn:  # generated text may be tokenized otherwise
        assert [token.logprob for token in prefill] == choice.logprobs.token_logprobs
    ours = [token.logprob for token in hub.text_generation(PROMPT, **details).details.prefill]
    assert ours == choice.logprobs.token_logprobs[: len(ids)]


def test_a_seed_gives_the_same_outputs_streamed_and_with_company(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_new_tokens": 24, "seed": 5, "n": 3, "logprobs": 2}
    alone = http.post("/generate", json=body).json()["outputs"]
    assert len({output["text"] for output in alone}) > 1
    company = [
        threading.Thread(
            target=httpx.post,
            args=(f"{http.base_url}/generate",),
            kwargs={"json": {"prompt": f"# {k}", "max_new_tokens": 40}, "timeout": 60},
        )
        for k in range(4)
    ]
    for thread in company:
        thread.start()
    streamed: list[dict[str, Any]] = [{"text": "", "token_ids": [], "logprobs": []} for _ in alone]
    with http.stream("POST", "/generate", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            for name in streamed[0] if "index" in event else ():
                streamed[event["index"]][name] += event[name]
    for thread in company:
        thread.join()
    assert streamed == [{name: output[name] for name in streamed[0]} for output in alone]


def test_the_next_turn_finds_the_pages_of_this_one(http: httpx.Client) -> None:
    prompt = list(range(100, 164))
    body = {"prompt": prompt, "max_new_tokens": 33, "ignore_eos": True}
    first = http.post("/generate", json=body).json()
    longer = prompt + first["outputs"][0]["token_ids"][:32] + [200]
    again = http.post("/generate", json={"prompt": longer, "max_new_tokens": 1}).json()
    assert again["usage"]["cached_tokens"] == 96


def test_clients_that_leave_at_any_moment_give_every_page_back(
    url: str, http: httpx.Client
) -> None:
    wait_for(lambda: is_idle(http))
    before = num_pages(http)
    chance = random.Random(1)
    address = url.removeprefix("http://").split(":")
    for k in range(40):
        body = {
            "prompt": [chance.randrange(10, 5000) for _ in range(chance.randrange(1, 200))],
            "max_new_tokens": 300,
            "n": chance.choice([1, 1, 3]),
            "stream": chance.random() < 0.5,
            "ignore_eos": True,
        }
        content = json.dumps(body).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        with socket.create_connection((address[0], int(address[1]))) as client:
            client.sendall(head.encode() + content)
            time.sleep(chance.choice([0, 0.002, 0.01, 0.05]))
        if k % 10 == 0:
            assert http.post("/generate", json={"prompt": "x", "max_new_tokens": 2}).is_success
    wait_for(lambda: is_idle(http))
    assert num_pages(http) == before
    assert http.get("/ready").status_code == 200
    answered = metrics(http)
    assert answered['kvpaging_requests_total{finish_reason="abort"}'] > 0
    assert answered['kvpaging_requests_total{finish_reason="error"}'] == 0


def test_pins_and_pages_end_in_time_on_a_server_that_nobody_asks(http: httpx.Client) -> None:
    prompt = [random.randrange(10, 5000) for _ in range(80)]
    evicted = 'kvpaging_cache_evicted_pages_total{level="device",reason="expired"}'
    num_evicted = metrics(http)[evicted]
    pinned = http.post("/pins", json={"prompt": prompt[:48], "ttl_s": 2.5}).json()
    assert pinned["pages"] == 3
    assert metrics(http)["kvpaging_pinned_pages"] == 3
    body = {"prompt": prompt, "max_new_tokens": 1, "cache": {"ttl_s": 0.6}}
    http.post("/generate", json=body).raise_for_status()
    queried = metrics(http)["kvpaging_prefix_cache_queried_tokens_total"]
    # Neither of these makes a step.
    wait_for(lambda: metrics(http)["kvpaging_pinned_pages"] == 0)
    wait_for(lambda: metrics(http)[evicted] >= num_evicted + 5)
    assert http.get("/pins").json()["pins"] == []
    assert metrics(http)["kvpaging_prefix_cache_queried_tokens_total"] == queried


def test_an_explanation_is_the_engines(http: httpx.Client) -> None:
    prompt = [300 + i % 100 for i in range(70)]
    body = {"prompt": prompt, "max_new_tokens": 1, "explain": True}
    first = http.post("/generate", json=body).json()
    (told,) = first["explanations"]
    assert (told["prompt_tokens"], told["page_size"]) == (70, 16)
    assert told["levels"] == [
        {
            "level": "device",
            "pages": 0,
            "pages_left": 0,
            "first_mismatch": {"page": 0, "token": 0},
            "missed": [{"reason": "never_seen", "first_token": 0, "tokens": 64}],
        }
    ]
    reasons = [(run["reason"], run["tokens"]) for run in told["missed"]]
    assert reasons == [("never_seen", 64), ("below_page", 6)]
    again = http.post("/generate", json={**body, "stream": True}).text
    (told,) = json.loads(again.split("\n\n")[-3].removeprefix("data: "))["explanations"]
    assert told["cached_tokens"] == 64
    assert told["first_mismatch"] is None
