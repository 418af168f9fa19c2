"""The GPU benchmarks at tiny shapes on a CPU: they measure nothing here, but they all still run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
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


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts' modules can be imported."""
    for path in (SCRIPTS.parent, SCRIPTS):
        monkeypatch.syspath_prepend(str(path))


def run(script: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """With `path` as one more place that modules are found in."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    paths = [str(path) if path else "", os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(each for each in paths if each)
    command = [sys.executable, str(SCRIPTS / script), "--tiny", *arguments]
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


def test_other_packages_attention_is_timed_where_it_is_installed(tmp_path: Path) -> None:
    """Packages of these names that compute with torch: is the problem handed over right?"""
    (tmp_path / "flash_attn.py").write_text(FLASH_ATTN)
    (tmp_path / "flashinfer.py").write_text(FLASHINFER)
    out = tmp_path / "gpu.json"
    done = run("run.py", "--out", str(out), "--only", "decode,prefill", path=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(out.read_text())
    for part in ("decode", "prefill"):
        names = [row[part].split()[0] for row in found[part]]
        assert names == ["exact", "not", "flashinfer", "flash_attn", "torch"]


FLASH_ATTN = """
__version__ = "2.0"

def flash_attn_func(q, k, v, causal=False):
    assert causal and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    assert k.shape[1] == 300 or q.shape[1] == k.shape[1] == 40
    assert (q.shape[2], k.shape[2]) == (2, 1)
"""
FLASHINFER = """
__version__ = "0.2"

class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert layout == "HND"

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
             q_data_type=None, kv_data_type=None):
        assert indptr.tolist() == [0, 19, 38] and last_page_len.tolist() == [12, 12]
        assert (num_qo_heads, num_kv_heads, head_dim, page_size) == (2, 1, 16, 16)
        self.pages = sorted(indices.tolist())

    def run(self, q, pages):
        assert self.pages == list(range(len(pages[0]))) and q.shape == (2, 2, 16)

class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, workspace, layout):
        assert layout == "HND"

    def plan(self, qo_indptr, indptr, indices, last_page_len, num_qo_heads, num_kv_heads,
             head_dim, page_size, causal=False, q_data_type=None, kv_data_type=None):
        assert causal and qo_indptr.tolist() == [0, 40] and indptr.tolist() == [0, 3]
        assert last_page_len.tolist() == [8] and len(indices) == 3

    def run(self, q, pages):
        assert q.shape == (40, 2, 16)
"""


def test_every_question_has_an_answer_from_the_run(scripts: None) -> None:
    answers = importlib.import_module("answers").answers
    said = {row["question"][0]: row["answer"] for row in answers(MEASURED)}
    assert said == {
        "1": "4000 GB/s copied, 700 TFLOP/s in bfloat16",
        "2": "no: linear, 16x32 against 64x32: 0.5 % of the entries differ",
        "3": "split 512: 92 % of the copy bandwidth",
        "4": "a exact: 300 TFLOP/s; a: 400 TFLOP/s",
        "5": "1.50 at 1, 1.00 at 8 rows, of cuBLAS's time: exact does not stay the default by 10 %",
        "6": "copy_ 20.0 GB/s, kernel 50.0 GB/s: kernel",
        "7": "1.10 of the time with 32 layers a page",
    }
    every = [row["answer"] for row in answers(MEASURED)]
    assert "80 % at worst (64 x 4096 keys, pages of 16): 85 % missed" in every
    assert "exact 360, torch 500 TFLOP/s: 350 reached" in every
    unmeasured = [row["answer"] for row in answers({"bits": [{"FAILED": "no card"}]})]
    assert unmeasured == ["not measured"] * len(every)


def decoded(name: str, sequences: int, gigabytes: float, share: float) -> dict[str, Any]:
    sizes = {"sequences": sequences, "keys": 4096, "page": 16, "KV GB": gigabytes}
    return {"decode": name, **sizes, "us": 1000.0, "of copy %": share}


MEASURED: dict[str, list[dict[str, Any]]] = {
    "limits": [{"copy GB/s": 4000.0, "bf16 matrix TFLOP/s": 700.0}],
    "bits": [
        {"bits": "attention 64", "of": "extend", "and": "decode", "unequal %": 0.0},
        {"bits": "linear", "of": "16x32", "and": "64x32", "unequal %": 0.5},
    ],
    "decode": [
        decoded("exact", 1, 0.01, 9.0),  # too small to count
        decoded("exact", 64, 1.0, 80.0),
        decoded("exact", 256, 2.0, 90.0),
        decoded("torch", 256, 2.0, 20.0),
    ],
    "sweep-decode": [
        decoded("tile 32", 64, 1.0, 70.0),
        decoded("split 512", 64, 1.0, 92.0),
        {"decode": "tile 128", "no room": "shared memory"},
    ],
    "prefill": [
        {"prefill": "exact", "keys": 8192, "queries": 8192, "TFLOP/s": 360.0},
        {"prefill": "torch", "keys": 8192, "queries": 8192, "TFLOP/s": 500.0},
        {"prefill": "exact", "keys": 8192, "queries": 512, "TFLOP/s": 100.0},
    ],
    "sweep-prefill": [
        {"prefill": "a exact", "TFLOP/s": 300.0},
        {"prefill": "a", "TFLOP/s": 400.0},
        {"prefill": "b", "TFLOP/s": 100.0},
    ],
    "linear": [
        {"linear": "qkv", "rows": 1, "exact us": 20.0, "cuBLAS us": 10.0},
        {"linear": "down", "rows": 1, "exact us": 10.0, "cuBLAS us": 10.0},
        {"linear": "qkv", "rows": 8, "exact us": 10.0, "cuBLAS us": 10.0},
    ],
    "swap": [{"swap out": "copy_", "GB/s": 20.0}, {"swap out": "kernel", "GB/s": 50.0}],
    "layout": [
        decoded("1 layers a page", 32, 1.0, 90.0),
        {**decoded("32 layers a page", 32, 1.0, 81.0), "us": 1100.0},
    ],
}


def test_a_part_that_fails_shows_in_the_exit_status(tmp_path: Path) -> None:
    """The same script where launches take one argument less."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import runpy, sys\n"
        "from kernels.jit import linear\n"
        "launch = linear.linear_launch\n"
        "linear.linear_launch = lambda out, x, weight, bias, tiles: launch(out)\n"
        f"sys.argv[0] = {str(SCRIPTS / 'run.py')!r}\n"
        f"sys.path[0] = {str(SCRIPTS)!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(broken), "--tiny", "--out", str(out)]
    command += ["--only", "bits,sweep-linear"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(out.read_text())
    for part in ("bits", "sweep-linear"):
        assert "TypeError" in found[part][-1]["FAILED"]


def test_the_steps_script_measures_every_batch_and_both_engines(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    done = run("step.py", "--out", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    assert [row["decode, batch"] for row in found["decode"]] == [1, 3]
    for row in found["decode"]:
        assert row["step ms"] > 0
        assert row["least ms"] > 0
    ours, theirs, alike = found["throughput"]
    assert (ours["throughput"], theirs["throughput"]) == ("kvpaging", "transformers")
    assert ours["new tokens/s"] > 0
    assert theirs["new tokens/s"] > 0
    # The same weights and prompts: but for ties that bfloat16 breaks, the same tokens.
    assert alike["alike"] > 0


def test_the_least_of_a_step_is_what_its_bytes_and_products_take(scripts: None) -> None:
    step, report = importlib.import_module("step"), importlib.import_module("report")
    shapes = importlib.import_module("model_shapes")
    raw = {**shapes.COMMON, **shapes.SHAPES["llama-3-8b"], "vocab_size": 128_256}
    config = SimpleNamespace(
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_layers=32,
        vocab_size=128_256,
    )
    operations = list(step.decode_operations(config, 1, 2048))
    # All weights but the embedding's and the norms', 2,048 keys and values, little besides.
    weights = sum(
        2 * shape[0] * shape[1]
        for name, shape in shapes.parameters(raw)
        if len(shape) == 2 and "embed" not in name
    )
    assert weights == 2 * 7_504_658_432
    moved = sum(one.num_bytes for one in operations)
    keys = 2048 * 32 * 2 * 8 * 128 * 2
    assert weights + keys < moved < 1.002 * (weights + keys)
    slow_copy = report.Machine("cpu", True, copy_gb_s=1.0, matrix_tflop_s=1e9)
    assert step.least_ms(slow_copy, operations) == pytest.approx(moved / 1e6)
    flop = sum(one.flop for one in operations)
    assert flop == pytest.approx(weights + 32 * 4 * 2048 * 4096)
    slow_products = report.Machine("cpu", True, copy_gb_s=1e9, matrix_tflop_s=1e-3)
    assert step.least_ms(slow_products, operations) == pytest.approx(flop / 1e6, rel=1e-3)
