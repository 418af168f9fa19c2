"""What every request gets: an id, a key check, one log line, and an answer to every error."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from fake_engine import FakeEngineClient
from http_app import MODEL, Caller, make_app

PROMPT = "a very secret prompt"
ROUTES = [
    ("GET", "/version"),
    ("GET", "/v1/models"),
    ("GET", "/info"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
    ("POST", "/generate"),
    ("POST", "/tokenize"),
    ("POST", "/v1/completions"),
]


def access_lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "server.access"]


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Bearer no", "Basic k-1", "k-1", "é"])
def test_without_a_key_nothing_but_health_answers(header: str) -> None:
    http = Caller(make_app(FakeEngineClient(), api_keys=("k-1", "k-2")))
    for method, path in ROUTES:
        response = http.request(method, path, headers={"Authorization": header.encode()})
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
    assert http.post("/", {"inputs": "x"}).json()["error_type"] == "authentication_error"
    for path in ("/live", "/health", "/ready"):
        assert http.get(path).status_code == 200


@pytest.mark.parametrize("header", ["Bearer k-1", "bearer k-2", "Bearer  k-1 "])
def test_each_key_opens(header: str) -> None:
    http = Caller(make_app(FakeEngineClient(), api_keys=("k-1", "k-2")))
    assert http.get("/version", headers={"Authorization": header}).status_code == 200


def test_without_keys_everybody_may_ask() -> None:
    assert Caller(make_app(FakeEngineClient())).get("/version").status_code == 200


def test_a_sane_request_id_is_kept_and_another_is_replaced() -> None:
    http = Caller(make_app(FakeEngineClient()))
    for given in ("abc-123", "trace:7/8", "a" * 128):
        assert http.get("/live", headers={"X-Request-Id": given}).headers["x-request-id"] == given
    for given in ("", "a b", "a" * 129, 'x"', "é"):
        made = http.get("/live", headers={"X-Request-Id": given.encode()}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{24}", made)
    assert http.get("/live").headers["x-request-id"] != http.get("/live").headers["x-request-id"]


def test_one_log_line_with_the_numbers_and_never_the_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    http = Caller(make_app(FakeEngineClient(num_cached_tokens=1)))
    body = {"prompt": PROMPT, "max_new_tokens": 4, "n": 2, "stop": ["never"]}
    http.post("/generate", body, headers={"X-Request-Id": "r-1"})
    (line,) = access_lines(caplog)
    fields: dict[str, Any] = vars(line)
    assert line.getMessage() == "POST /generate 200"
    assert fields["request_id"] == "r-1"
    assert fields["generation_id"].startswith("gen-")
    assert (fields["completion_tokens"], fields["cached_tokens"]) == (8, 1)
    assert fields["prompt_tokens"] > 4
    assert fields["finish_reasons"] == "length,length"
    assert fields["queue_ms"] == 1.0
    assert 0 < fields["ttft_ms"] < fields["total_ms"]
    assert "secret" not in caplog.text
    assert all("secret" not in str(vars(record)) for record in caplog.records)


def test_an_error_is_in_the_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    http = Caller(make_app(FakeEngineClient(dies_after=1)))
    http.post("/generate", {"prompt": PROMPT, "stream": True})
    http.post("/generate", {"prompt": PROMPT, "temprature": 1})
    http.get("/nowhere")
    died, refused, lost = access_lines(caplog)
    assert (died.getMessage(), vars(died)["error"]) == ("POST /generate 200", "engine_died")
    assert (refused.getMessage(), vars(refused)["error"]) == ("POST /generate 400", "invalid_value")
    assert (lost.getMessage(), vars(lost)["error"]) == ("GET /nowhere 404", "not_found")


def test_a_path_can_not_forge_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Caller(make_app(FakeEngineClient())).get("/a%0AERROR%20b" + "c" * 500)
    (line,) = access_lines(caplog)
    assert line.getMessage().startswith("GET /a%0AERROR%20bccc")
    assert len(line.getMessage()) < 250


def test_a_crash_is_logged_with_its_traceback_and_answered_with_one_body(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    http = Caller(make_app(FakeEngineClient(crashes_after=0)))
    response = http.post("/generate", {"prompt": "x"}, headers={"X-Request-Id": "r-9"})
    assert response.status_code == 500
    assert response.json() == {
        "error": {
            "message": "an internal error; the server's log has its traceback",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
    (crash,) = [record for record in caplog.records if record.exc_info]
    assert vars(crash)["request_id"] == "r-9"
    assert crash.exc_info is not None
    assert crash.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/nowhere", 404, "not_found"),
        ("GET", "/v1/models/other/name", 404, "model_not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_routes_that_are_not_there(method: str, path: str, status: int, code: str) -> None:
    response = Caller(make_app(FakeEngineClient())).request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    if status == 405:
        assert response.headers["allow"]


def test_tgis_paths_answer_in_its_words() -> None:
    http = Caller(make_app(FakeEngineClient()))
    assert http.request("DELETE", "/").json().keys() == {"error", "error_type"}
    assert http.get("/generate_stream").json().keys() == {"error", "error_type"}
    assert http.post("/generate_stream", content=b"{").status_code == 422
    assert MODEL in http.get("/").text
