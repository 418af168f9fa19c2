"""`docs/http.md` says what the server does: routes, fields and metrics, none more, none less."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from fake_engine import FakeEngineClient
from http_app import Caller, make_app
from starlette.exceptions import HTTPException

from server.client import EngineState
from server.errors import answer_to
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


def codes_in(source: str) -> set[str]:
    """Each `code="…"` of a module, third argument of `ErrorAnswer`, and default of a `code`."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            if isinstance(node.func, ast.Name) and node.func.id == "ErrorAnswer":
                found += node.args[2:3]
        elif isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in node.args.kwonlyargs]
            found += [
                default
                for name, default in zip(names, node.args.kw_defaults, strict=True)
                if name == "code"
            ]
    return {
        node.value
        for node in found
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_error_codes() -> None:
    rows = re.findall(r"^\| [\d, ]+ \| (.*?) \|", section("Errors"), re.M)
    listed = {code for row in rows for code in re.findall(r"`(\w+)`", row)}
    root = Path(__file__).parents[2]
    used = {state.value for state in EngineState if state is not EngineState.READY}
    for source in [*root.glob("server/**/*.py"), root / "kvpaging/base/errors.py"]:
        used |= codes_in(source.read_text("utf-8"))
    for status in (404, 405):
        used.add(answer_to(HTTPException(status)).code)
    in_logs_only = {"gone", "slow_reader"}
    of_our_own_ids = {"duplicate_id"}
    assert used - in_logs_only - of_our_own_ids == listed
