"""What loading takes at its peak: the weights, and little more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_paths import cpu_paths
from safetensors.torch import save_file

from kvpaging.base.kv_spec import KVSpec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}

# Loads twice in one process: first a small share of the code paths, so that what libraries
# allocate once is not counted; then for real, from a peak that was reset.
SCRIPT = """
import sys
from kvpaging.base.config import EngineOptions
from kvpaging.execution.loading import load_executor

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

small, large, kernels = sys.argv[1:]
def load(model):
    return load_executor(EngineOptions(
        model=model, device="cpu", dtype="bfloat16", threads=1, kernels=kernels,
        kv_cache_memory_bytes=16 * 2**20,
    ))
load(small)[1].close()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
config, executor = load(large)
print(status("VmHWM") - before, config.kv_cache_bytes)
"""


def write(directory: Path, config: dict[str, object]) -> int:
    """A checkpoint of constants; returns its bytes."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])  # type: ignore[call-overload]
    head, vocab = hidden // 16, int(config["vocab_size"])  # type: ignore[call-overload]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(int(config["num_hidden_layers"])):  # type: ignore[call-overload]
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (8 * head, hidden),
            f"{layer}.self_attn.v_proj.weight": (8 * head, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    tensors = {
        name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()
    }
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return sum(2 * tensor.numel() for tensor in tensors.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_is_at_most_1_3_times_the_weights_beside_the_pool(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    write(small, {**CONFIG, "num_hidden_layers": 1, "vocab_size": 128})
    weight_bytes = write(large, CONFIG)
    assert weight_bytes > 200e6
    for path in cpu_paths():
        out = subprocess.run(
            [sys.executable, "-P", "-c", SCRIPT, str(small), str(large), path],
            capture_output=True,
            text=True,
            check=True,
            timeout=850,
        ).stdout
        peak, pool_bytes = map(int, out.split())
        spec = KVSpec(5, 8, 64, 16, "bfloat16")
        assert 15e6 < pool_bytes <= 16 * 2**20
        assert pool_bytes % spec.page_bytes == 0
        assert peak > 0.9 * weight_bytes, "measured something else"
        assert peak <= 1.3 * weight_bytes + pool_bytes, f"{path}: {peak / weight_bytes:.2f}"
