from __future__ import annotations

import subprocess
import sys

import pytest
import tiny_text
from fake_engine import FakeEngineClient, engine_config
from http_app import MODEL, Caller, make_app

from server.client import EngineState


@pytest.mark.parametrize(
    ("state", "is_draining", "health", "ready"),
    [
        (EngineState.READY, False, (200, None), (200, None)),
        (EngineState.READY, True, (200, None), (503, "draining")),
        (EngineState.LOADING, False, (503, "loading"), (503, "loading")),
        (EngineState.STALLED, False, (503, "stalled"), (503, "stalled")),
        (EngineState.DEAD, False, (503, "dead"), (503, "dead")),
    ],
)
def test_health(
    state: EngineState,
    is_draining: bool,
    health: tuple[int, str | None],
    ready: tuple[int, str | None],
) -> None:
    http = Caller(make_app(FakeEngineClient(state=state)))
    if is_draining:
        http.app.state.drain()
    assert http.get("/live").status_code == 200
    for path, (status, code) in (("/health", health), ("/ready", ready)):
        response = http.get(path)
        assert response.status_code == status
        if code is not None:
            assert response.json()["error"]["code"] == code
            assert response.headers["retry-after"]


def test_draining_refuses_new_requests_and_lets_running_ones_finish() -> None:
    engine = FakeEngineClient()
    http = Caller(make_app(engine))

    def drain_while_it_runs(request: object, index: int, position: int) -> int:
        http.app.state.drain()
        return 5

    engine.script = drain_while_it_runs
    first = http.post("/generate", {"prompt": "x", "max_new_tokens": 5})
    assert first.status_code == 200
    second = http.post("/generate", {"prompt": "x"})
    assert second.status_code == 503
    assert second.json()["error"]["code"] == "draining"
    assert second.headers["retry-after"] == "5"


def test_version() -> None:
    found = Caller(make_app(FakeEngineClient())).get("/version").json()
    assert found["model"] == MODEL
    assert (found["kernels"], found["exact"], found["max_model_len"]) == ("none", True, 256)
    empty = Caller(make_app(FakeEngineClient(config=None))).get("/version").json()
    assert (empty["model"], empty["kernels"], empty["exact"]) == (MODEL, None, None)


def test_tokenize_and_back() -> None:
    http = Caller(make_app(FakeEngineClient(config=engine_config(vocab_size=400))))
    text = "The dog é😀"
    ids = tiny_text.text().tokenizer.encode(text)
    assert http.post("/tokenize", {"prompt": text}).json() == {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": 256,
    }
    assert http.post("/detokenize", {"tokens": ids}).json() == {"prompt": text}
    assert http.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert http.post("/detokenize", {"tokens": [1, *ids]}).json() == {"prompt": "<bos>" + text}
    skipped = {"tokens": [1, *ids], "skip_special_tokens": True}
    assert http.post("/detokenize", skipped).json() == {"prompt": text}
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    shown = http.post("/tokenize", chat).json()["tokens"]
    assert shown == tiny_text.text().tokenizer.encode("<bos>[user] Hi\n[assistant] ")
    for body in ({}, {"prompt": "x", **chat}, {"prompt": 1}):
        assert http.post("/tokenize", body).status_code == 400
    for tokens in ([400], [-1], [True], "x", None, [2**60]):
        assert http.post("/detokenize", {"tokens": tokens}).status_code == 400


def test_the_application_imports_no_torch() -> None:
    code = "import sys, server.app, server.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
