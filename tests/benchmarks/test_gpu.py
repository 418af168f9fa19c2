"""The GPU benchmarks at tiny shapes on a CPU: they measure nothing here, but they all still run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "gpu"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed"),
]

PARTS = {
    "bits": "bits",
    "decode": "decode",
    "prefill": "prefill",
    "linear": "linear",
    "layout": "decode",
    "swap": "swap out",
    "sweep-decode": "decode",
    "sweep-prefill": "prefill",
    "sweep-linear": "linear tile",
}
"""All but `checks`, which are tests of their own; and what a row of each is named by."""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(SCRIPTS / script), "--tiny", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_every_part_of_the_kernels_script_measures_something(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = run("run.py", "--out", str(out), "--only", ",".join(PARTS))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    for part, label in PARTS.items():
        assert found[part], part
        for row in found[part]:
            assert label in row, (part, row)
            numbers = [value for value in row.values() if isinstance(value, float)]
            assert numbers, (part, row)


def test_a_part_that_fails_shows_in_the_exit_status(tmp_path: Path) -> None:
    """The same script where launches take one argument less."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import runpy, sys\n"
        "from kernels.jit import linear\n"
        "launch = linear.linear_launch\n"
        "linear.linear_launch = lambda out, x, weight, bias, tiles: launch(out)\n"
        f"sys.argv[0] = {str(SCRIPTS / 'run.py')!r}\n"
        "sys.path[0] = ''\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-P", str(broken), "--tiny", "--out", str(out)]
    command += ["--only", "bits,sweep-linear"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(out.read_text())
    for part in ("bits", "sweep-linear"):
        assert "TypeError" in found[part][-1]["FAILED"]
