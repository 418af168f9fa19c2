"""`/metrics`, `/pages` and `/cache` are the operator's; everything else is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngineClient
from http_app import Caller, make_app

from server.keys import KeyFile

OPERATORS = ("/metrics", "/pages", "/cache", "/cache/", "/cache/nowhere")
CLIENTS = ("/version", "/v1/models", "/pages/other", "/cached")


def status(config: dict[str, Any], path: str, key: str | None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return Caller(make_app(FakeEngineClient(), **config)).get(path, headers=headers).status_code


@pytest.mark.parametrize("path", OPERATORS)
@pytest.mark.parametrize(
    ("config", "refused", "let_in"),
    [
        ({}, {}, (None, "any")),
        ({"operator_key": "op"}, {None: 401, "k": 403, "op2": 403}, ("op",)),
        ({"api_keys": ("k",)}, {None: 401, "x": 403}, ("k",)),
        ({"api_keys": ("k",), "operator_key": "op"}, {None: 401, "k": 403}, ("op",)),
        ({"api_keys": ("k", "l")}, {None: 401, "k": 403, "l": 403, "x": 403}, ()),
        ({"api_keys": ("k", "l"), "operator_key": "op"}, {None: 401, "k": 403}, ("op",)),
    ],
)
def test_who_gets_through(
    path: str,
    config: dict[str, Any],
    refused: dict[str | None, int],
    let_in: tuple[str | None, ...],
) -> None:
    for key, expected in refused.items():
        assert status(config, path, key) == expected
    for key in let_in:
        assert status(config, path, key) not in (401, 403)


@pytest.mark.parametrize("path", CLIENTS)
def test_the_operators_key_opens_nothing_else(path: str) -> None:
    config = {"api_keys": ("k", "l"), "operator_key": "op"}
    assert status(config, path, "op") == 401
    assert status(config, path, "k") != 401


def test_without_client_keys_the_rest_stays_open() -> None:
    assert status({"operator_key": "op"}, "/version", None) == 200


def test_the_refusal_says_what_to_set() -> None:
    http = Caller(make_app(FakeEngineClient(), api_keys=("k", "l")))
    answer = http.get("/metrics", headers={"Authorization": "Bearer k"})
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("operator_only", "permission_error")
    assert "KVPAGING_OPERATOR_KEY" in error["message"]
    unknown = http.get("/metrics", headers={"Authorization": "Bearer x"})
    assert unknown.json() == answer.json()  # nor does it tell which keys are known


def test_page_itself_is_open_and_its_data_is_not() -> None:
    http = Caller(make_app(FakeEngineClient(), api_keys=("k",), operator_key="op"))
    assert http.get("/pages/view").status_code == 200
    assert http.get("/pages", headers={"Authorization": "Bearer k"}).status_code == 403


def test_a_role_in_the_file_of_keys_opens_the_door_unless_there_is_an_operator_key(
    tmp_path: Path,
) -> None:
    path = tmp_path / "keys"
    path.write_text('{"key": "u", "tenant": "a"}\n{"key": "o", "tenant": "b", "role": "operator"}')
    by_role: dict[str, Any] = {"keys": KeyFile(path)}
    assert status(by_role, "/metrics", "o") == 200
    assert status(by_role, "/version", "o") == 200
    assert status(by_role, "/metrics", "u") == status(by_role, "/metrics", "x") == 403
    assert status(by_role | {"operator_key": "op"}, "/metrics", "o") == 403
    assert status(by_role | {"operator_key": "op"}, "/metrics", "op") == 200
