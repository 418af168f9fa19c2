"""`kvpaging plan` as people and programs call it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvpaging.replay.synthetic import conversations, write_mooncake
from server import cli

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "rope_theta": 10000.0,
    "model_type": "llama",
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(bytes(4_000_000))
    trace = folder / "trace.jsonl"
    write_mooncake(conversations(60, seed=3), trace)
    return ["--model", str(folder), "--trace", str(trace), "--page-size", "64"]


DEVICE = ["--bandwidth", "100", "--tflops", "1"]


def test_json_is_one_object_a_rate(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = [*flags, *DEVICE, "--memory", "104MB", "--rate", "1", "--rate", "9", "--json"]
    assert cli.main(["plan", *given]) == 0
    calm, busy = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (calm["requests_per_s"], busy["requests_per_s"]) == (1, 9)
    # 2 layers, keys and values, 2 heads of 16 in float32: 512 bytes a token
    assert calm["num_pages"] == 100_000_000 // (512 * 64) - 1
    assert 0 < calm["outcome"]["hit_ratio_tokens"] < 1
    assert busy["output_tokens_per_s"] > calm["output_tokens_per_s"]


def test_words_and_measured_steps(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = tmp_path / "steps.json"
    times = {"fixed_s": 0.001, "per_new_token_s": 1e-5, "per_context_token_s": 1e-8}
    steps.write_text(json.dumps({"times": times}))
    given = [*flags, "--steps", str(steps), "--kv-cache-memory", "64MiB", "--requests", "20"]
    assert cli.main(["plan", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "requests of the trace's mean length" in lines[0]
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "--memory or --kv-cache-memory"),
        (["--memory", "8GiB"], "--steps FILE"),
        (["--memory", "much", *DEVICE], "a number with an optional unit"),
        (["--memory", "1MB", *DEVICE], "are left for KV pages"),
        (["--memory", "8GiB", "--bandwidth", "0", "--tflops", "1"], "--bandwidth must be above 0"),
        (["--memory", "8GiB", "--steps", "/nowhere"], "not of 'kvpaging bench'"),
        (["--memory", "8GiB", *DEVICE, "--policy", "x"], "--policy must be"),
        (["--memory", "8GiB", *DEVICE, "--dtype", "int4"], "--dtype must be"),
    ],
)
def test_refusals(
    flags: list[str], given: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *flags, *given]) == 2
    assert complaint in capsys.readouterr().err


def test_neither_plan_nor_replay_loads_torch() -> None:
    code = "import sys, server.plan, server.replay; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
