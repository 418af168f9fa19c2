"""What one tenant can learn of what another sent, over HTTP, of the whole server: nothing.

One server with two tenants. In each trial one of them asks for a prompt that the other did, or did
not, send just before, in an order drawn by chance; whatever can be seen from outside is compared
between the two classes.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import roc
import tiny_text
from http_app import wait_for

COMMAND = (sys.executable, "-P", "-m", "server", "serve", "--port", "0")
KEYS = {"alice": "sk-alice-hush", "bob": "sk-bob-hush", "ops": "sk-ops-hush"}
MODEL = checkpoints.Case(
    "slow-enough",
    "llama",
    {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "max_position_embeddings": 1024,
    },
)
NUM_TOKENS = 384
"""Of a prompt: so many that a hit takes a small part of what a miss takes."""
ROUND = 20
"""Prompts that are sent ahead at once; half of them are asked for by the other tenant."""


class Server:
    def __init__(self, directory: Path):
        self.directory = directory
        self.lot = random.Random(7)
        """Draws prompts that nobody has sent yet; the disk keeps all that were."""
        self.log = ""
        model = directory / "model"
        checkpoints.make(MODEL, model)
        tiny_text.byte_level().save(str(model / "tokenizer.json"))
        self.keys = directory / "keys"
        self.write_keys(**KEYS)
        flags = ("--model", model, "--api-keys", self.keys, "--shared-scope", "--threads", "1")
        flags += ("--kv-cache-memory", "64MiB", "--record", directory / "recording")
        flags += ("--disk-cache", directory / "pages")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KVPAGING_")}
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        found = None
        while found is None:
            line = self.process.stdout.readline()
            assert line, f"it ended before it was ready: {self.log}"
            found = re.search(r"address +http://(\S+)", line)
        self.address = found[1]
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def write_keys(self, **keys: str) -> None:
        lines = [
            {"key": key, "tenant": tenant, "role": "operator" if tenant == "ops" else "user"}
            for tenant, key in keys.items()
        ]
        aside = self.keys.with_name("keys.new")
        aside.write_text("\n".join(map(json.dumps, lines)))
        aside.chmod(0o600)
        aside.rename(self.keys)

    def client(self, tenant: str, key: str | None = None) -> Client:
        return Client(self.address, key or KEYS[tenant])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(300)
        self._reader.join(60)


@dataclass
class Answer:
    ttft_s: float
    end: dict[str, Any]
    """The stream's last event: usage and timings."""

    @property
    def num_cached(self) -> int:
        cached: int = self.end["usage"]["cached_tokens"]
        return cached


class Client:
    """One tenant, on one connection. As lean as possible: what it takes itself is noise."""

    def __init__(self, address: str, key: str):
        self._connection = http.client.HTTPConnection(address, timeout=600)
        self._headers = {"Authorization": f"Bearer {key}"}

    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[int, bytes]:
        content = None if body is None else json.dumps(body)
        self._connection.request(method, path, content, self._headers)
        response = self._connection.getresponse()
        return response.status, response.read()

    def generate(self, prompt: list[int], **fields: Any) -> Answer:
        body = json.dumps({"prompt": prompt, "max_new_tokens": 1, "stream": True, **fields})
        begun = time.perf_counter()
        self._connection.request("POST", "/generate", body, self._headers)
        response = self._connection.getresponse()
        first = response.readline()
        ttft_s = time.perf_counter() - begun
        assert response.status == 200, first + response.read()
        *_, end, done = response.read().decode().strip().split("\n\n")
        assert done == "data: [DONE]"
        return Answer(ttft_s, json.loads(end.removeprefix("data: ")))

    def send_ahead(self, prompts: list[list[int]], **fields: Any) -> None:
        body = {"model": "model", "prompt": prompts, "max_tokens": 1, **fields}
        status, answer = self.request("POST", "/v1/completions", body)
        assert status == 200, answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("privacy"))
    yield server
    server.close()


def prompt(lot: random.Random, num_tokens: int = NUM_TOKENS) -> list[int]:
    return [lot.randrange(3, 512) for _ in range(num_tokens)]


@dataclass
class Seen:
    """What was measured of prompts that nobody had sent, and that the other client had sent."""

    fresh: list[Answer]
    known: list[Answer]

    def area(self, number: Any) -> float:
        """How well the number tells which a prompt was; fresh ones are expected to take longer."""
        return roc.area([number(a) for a in self.known], [number(a) for a in self.fresh])


def probe(lot: random.Random, sender: Client, asker: Client, num_each: int, **fields: Any) -> Seen:
    """Measure `num_each` prompts of each class.

    In each round the sender sends a number of prompts, and the asker then asks for half of those
    and for as many others, shuffled: the load is the same before both, and what drifts cancels.
    """
    seen = Seen([], [])
    while len(seen.known) < num_each:
        sent = [prompt(lot) for _ in range(ROUND)]
        sender.send_ahead(sent, **fields)
        asked = [(p, True) for p in sent[: ROUND // 2]]
        asked += [(prompt(lot), False) for _ in range(ROUND // 2)]
        lot.shuffle(asked)
        for tokens, was_sent in asked:
            answer = asker.generate(tokens, **fields)
            (seen.known if was_sent else seen.fresh).append(answer)
    return seen


def ttft(answer: Answer) -> float:
    return answer.ttft_s


def prefill(answer: Answer) -> float:
    return float(answer.end["timings"]["prefill_ms"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_time_to_first_token_tells_nothing_of_another_tenants_prompts(server: Server) -> None:
    """Where nothing leaks the area's standard error is 0.0136 with 900 of each class.

    So 0.05 is 3.7 of them, which chance exceeds once in 5,000 runs. What looks like a leak is
    therefore measured on: with 3,600 of each class the bound is 7.3 standard errors. Nothing that
    was measured is thrown away, so that a leak stays one.
    """
    seen = Seen([], [])
    while len(seen.known) < 3600:
        more = probe(server.lot, server.client("alice"), server.client("bob"), 900)
        seen = Seen([*seen.fresh, *more.fresh], [*seen.known, *more.known])
        off = {number.__name__: seen.area(number) - 0.5 for number in (ttft, prefill)}
        if max(map(abs, off.values())) <= 0.05:
            break
    assert len(seen.fresh) == len(seen.known) >= 900
    assert {answer.num_cached for answer in (*seen.fresh, *seen.known)} == {0}
    assert max(map(abs, off.values())) <= 0.05, off


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sender", "asker", "fields"),
    [("alice", "alice", {}), ("alice", "bob", {"cache_scope": "shared"})],
    ids=["one tenant", "shared scope"],
)
def test_the_same_measurement_sees_what_is_meant_to_be_found(
    server: Server, sender: str, asker: str, fields: dict[str, Any]
) -> None:
    """What else runs on the machine can only blur it, so trying again hides nothing."""
    areas: list[float] = []
    while len(areas) < 4 and max(areas, default=0.0) < 0.95:  # 1.0 where nothing else runs
        seen = probe(server.lot, server.client(sender), server.client(asker), 60, **fields)
        assert {answer.num_cached for answer in seen.fresh} == {0}
        assert {answer.num_cached for answer in seen.known} == {NUM_TOKENS - 16}
        areas.append(seen.area(ttft))
    assert max(areas) >= 0.7, areas  # what tells nothing stays within 0.05 of one half


def test_no_dialect_and_no_fork_finds_another_tenants_pages(server: Server) -> None:
    alice, bob = server.client("alice"), server.client("bob")
    tokens = prompt(random.Random(1), 100)
    text = "never say this to anybody " * 8
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"prompt": tokens, "max_new_tokens": 2, "n": 3}),
        ("/generate", {"prompt": text, "max_new_tokens": 2, "cache_salt": "alice"}),
        ("/v1/completions", {"model": "model", "prompt": text[5:], "max_tokens": 2, "n": 2}),
        ("/v1/completions", {"model": "model", "prompt": tokens[7:], "cache_scope": "tenant"}),
    ]
    for path, body in bodies:
        for client, finds in ((alice, False), (bob, False), (alice, True), (bob, True)):
            status, content = client.request("POST", path, body)
            assert status == 200, content
            usage = json.loads(content)["usage"]
            details = usage.get("prompt_tokens_details", usage)
            assert (details["cached_tokens"] > 0) == finds, (path, body)


def test_an_explanation_is_the_same_whether_another_tenant_sent_the_prompt_or_not(
    server: Server,
) -> None:
    alice, bob = server.client("alice"), server.client("bob")
    lot = random.Random(8)
    known, fresh = prompt(lot), prompt(lot)
    alice.send_ahead([known])
    (first,), (second,) = (
        bob.generate(tokens, explain=True).end["explanations"] for tokens in (known, fresh)
    )
    assert first == second
    assert first["prompt_tokens"] == NUM_TOKENS
    (own,) = alice.generate(known, explain=True).end["explanations"]
    assert own != first


def test_an_explanation_of_pages_on_the_disk_holds_nothing_measured_of_others(
    server: Server,
) -> None:
    alice, bob, ops = (server.client(tenant) for tenant in ("alice", "bob", "ops"))
    lot = random.Random(9)
    prompts = [prompt(lot) for _ in range(10)]
    before = pages_on_disk(ops)
    bob.send_ahead(prompts)
    until = time.monotonic() + 60
    while pages_on_disk(ops) < before + len(prompts) * NUM_TOKENS // 16:
        assert time.monotonic() < until, "the disk never got them"
        time.sleep(0.02)
    told = []
    for tokens in prompts:
        assert ops.request("DELETE", "/cache?level=device")[0] == 200
        (one,) = bob.generate(tokens, explain=True).end["explanations"]
        assert one["levels"][1]["level"] == "disk"
        load = one.pop("load")
        if load is not None:
            assert load.keys() == {"pages_below", "pages_asked", "pages_loaded", "load_ms"}
            told.append(load["pages_below"])
        theirs = prompt(lot)
        alice.send_ahead([theirs])  # what the others' pages take changes between the two
        assert ops.request("DELETE", "/cache?level=device")[0] == 200
        alice.generate(theirs)
    if not told:
        pytest.skip("a machine so busy that computing always measured faster than the disk")
    assert set(told) == {NUM_TOKENS // 16 - 1}


def pages_on_disk(operator: Client) -> int:
    status, content = operator.request("GET", "/cache/stats")
    assert status == 200, content
    (pages,) = (one["pages"] for one in json.loads(content)["levels"] if one["level"] == "disk")
    return int(pages)


def test_no_route_tells_a_tenant_what_another_does(server: Server) -> None:
    bob = server.client("bob")
    paths = json.loads(bob.request("GET", "/openapi.json")[1])["paths"]
    questions = [path for path, methods in paths.items() if "get" in methods and "{" not in path]
    assert {"/metrics", "/pages", "/version", "/v1/models"} <= set(questions)
    before = {path: bob.request("GET", path) for path in questions}
    server.client("alice").send_ahead([prompt(random.Random(2)) for _ in range(4)])
    after = {path: bob.request("GET", path) for path in questions}
    assert after == before
    operators = {path for path, (status, _) in before.items() if status == 403}
    assert {"/metrics", "/pages"} <= operators
    assert all(status == 200 for path, (status, _) in before.items() if path not in operators)
    ops = server.client("ops")
    assert all(ops.request("GET", path)[0] == 200 for path in ("/metrics", "/pages"))


def test_a_salt_narrows_within_the_tenant(server: Server) -> None:
    alice, bob = server.client("alice"), server.client("bob")
    tokens = prompt(random.Random(3))
    for salt in ("", "a", "\0", "\uffff" * 1024, "alice"):
        assert alice.generate(tokens, cache_salt=salt).num_cached == 0
        assert alice.generate(tokens, cache_salt=salt).num_cached == NUM_TOKENS - 16
        assert bob.generate(tokens, cache_salt=salt).num_cached == 0


def test_what_is_shared_is_found_by_all_and_what_follows_by_its_tenant(server: Server) -> None:
    alice, bob = server.client("alice"), server.client("bob")
    tokens = prompt(random.Random(4), 64)
    assert alice.generate(tokens).num_cached == 0
    shared = {"cache_scope": "shared"}
    assert alice.generate(tokens, **shared).num_cached == 0, "a tenant's own page is not shared"
    assert bob.generate(tokens, **shared).num_cached == 48
    assert bob.generate(tokens).num_cached == 0


def test_a_tenant_keeps_its_pages_over_a_change_of_keys(server: Server) -> None:
    tokens = prompt(random.Random(5))
    server.client("alice").generate(tokens)
    try:
        server.write_keys(**KEYS | {"alice": "sk-alice-new"})
        server.process.send_signal(signal.SIGHUP)
        alice = server.client("alice", "sk-alice-new")
        deadline = time.monotonic() + 60
        while alice.request("GET", "/version")[0] == 401:
            assert time.monotonic() < deadline
        assert alice.generate(tokens).num_cached == NUM_TOKENS - 16
        assert server.client("alice").request("GET", "/version")[0] == 401
    finally:
        server.write_keys(**KEYS)
        server.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 60
    while server.client("alice").request("GET", "/version")[0] == 401:
        assert time.monotonic() < deadline


def test_another_tenants_request_id_is_no_handle_on_it(server: Server) -> None:
    alice, bob = server.client("alice"), server.client("bob")
    first = alice.generate(prompt(random.Random(6)))
    ids = {first.end["id"], bob.generate(prompt(random.Random(6))).end["id"]}
    assert len(ids) == 2
    assert all(re.fullmatch("gen-[0-9a-f]{24}", request_id) for request_id in ids)
    paths = json.loads(bob.request("GET", "/openapi.json")[1])["paths"]
    # A pin's id is no handle for another either: test_pins.
    assert {path for path in paths if "{" in path} == {
        "/v1/models/{model_id}",
        "/pins/{pin_id}",
        "/cache/pins/{pin_id}",
    }


def test_no_key_and_no_prompt_is_anywhere_but_in_the_file(server: Server) -> None:
    alice = server.client("alice")
    alice.request("POST", "/generate", {"prompt": "hush hush", "max_new_tokens": 1})
    alice.request("POST", "/generate", {"prompt": "hush", "max_new_tokens": "hush"})
    alice.request("GET", "/version")
    server.client("alice", "sk-hush-nobody").request("GET", "/version")
    wait_for(lambda: server.log.count("tenant=alice") >= 3)
    pid = server.process.pid
    (engine,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    places = {
        "arguments": Path(f"/proc/{pid}/cmdline").read_text(),
        "the engine's arguments": Path(f"/proc/{engine}/cmdline").read_text(),
        "the engine's environment": Path(f"/proc/{engine}/environ").read_text(),
        "the recording": (server.directory / "recording").read_text(),
        "the log": server.log,
    }
    for place, text in places.items():
        assert len(text) > 20, place
        assert "hush" not in text, place
    assert "alice" not in places["the recording"]
    assert "KVPAGING_" not in places["the engine's environment"]
