"""The tests exercise what pip installed, also when they run from the clone."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

CLONE = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["server", "kvpaging", "kernels"])
def test_a_started_process_runs_the_same_code_as_these_tests(name: str) -> None:
    here = importlib.import_module(name).__file__
    code = f"import {name}; print({name}.__file__)"
    there = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=CLONE, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here
    origin = distribution("kvpaging").read_text("direct_url.json") or ""
    is_editable = '"editable": true' in origin
    assert is_editable or not Path(str(here)).is_relative_to(CLONE)
