"""`docs/http.md` says what the server does: routes, fields and metrics, none more, none less."""

from __future__ import annotations

import re
from pathlib import Path

from fake_engine import FakeEngineClient
from http_app import Caller, make_app

from server.schemas.generate import GenerateRequest

PAGE = (Path(__file__).parents[2] / "docs" / "http.md").read_text("utf-8")


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def names_in_tables(text: str) -> set[str]:
    cells = re.findall(r"^\| (.*?) \|", text, re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_routes() -> None:
    paths = Caller(make_app(FakeEngineClient())).get("/openapi.json").json()["paths"]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert names_in_tables(PAGE.split("\n## ", 1)[0]) == served


def test_fields_and_their_defaults() -> None:
    text = section("POST /generate")
    assert names_in_tables(text) == set(GenerateRequest.model_fields)


def test_metrics() -> None:
    http = Caller(make_app(FakeEngineClient()))
    http.post("/generate", {"prompt": "x", "max_new_tokens": 9999})
    lines = http.get("/metrics").text.splitlines()
    names = {re.split(r"[ {]", line)[0] for line in lines if not line.startswith("#")}
    served = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    listed = {name.split("{")[0] for name in names_in_tables(section("Metrics"))}
    assert {name for name in served if not name.endswith("_created")} == listed


def test_error_codes() -> None:
    listed = set(re.findall(r"`(\w+)`", section("Errors").split("|---|---|---|")[1]))
    sources = Path(__file__).parents[2] / "server"
    used = set()
    for source in sources.rglob("*.py"):
        used |= set(re.findall(r'\bcode="(\w+)"', source.read_text("utf-8")))
    assert used - {"duplicate_id"} <= listed  # our ids are our own: no client can cause that one
