"""Weights of int8 in whole models: how far off the logits are, and what stays as it is."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import case, make
from ops_paths import cpu_paths

from kernels import registry
from kvpaging.base.config import EngineOptions
from kvpaging.base.errors import ConfigError
from kvpaging.base.kv_spec import KVSpec
from kvpaging.execution import loading
from kvpaging.execution.batch import DeviceBatch
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.local_executor import LocalExecutor
from kvpaging.execution.model_config import read_model_config
from kvpaging.execution.models.layers import CausalLM
from kvpaging.execution.models.registry import model_class
from kvpaging.execution.weights import Checkpoint, Parameters

CPU = torch.device("cpu")
NUM_TOKENS = 48
LOGIT_BOUND = 0.02
"""Root mean square of the error over that of the logits about their mean (docs/kernels.md)."""


PAGES_BOUND = 0.02
"""The same for pages of int8 beside pages of float32."""


def logits(
    directory: Path, path: registry.PathName, quantization: str | None, pages: str = "float32"
) -> torch.Tensor:
    """Of each position of one prompt, in float32 apart from the weights and the pages."""
    config = read_model_config(directory)
    ops = registry.select(CPU, prefer=path, threads=1)
    parameters = Parameters(
        Checkpoint(directory), ops, CPU, torch.float32, quantization=quantization
    )
    model = model_class(config)(config, parameters, 64)
    parameters.finish(model.ignored_tensors())
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, 16, pages)
    tokens = torch.tensor([(7 * i + 3) % config.vocab_size for i in range(NUM_TOKENS)])
    every = torch.arange(NUM_TOKENS)
    batch = DeviceBatch(
        token_ids=tokens,
        positions=every.int(),
        slot_mapping=every + 16,
        page_tables=torch.tensor([[1, 2, 3]], dtype=torch.int32),
        seq_lens=torch.tensor([NUM_TOKENS], dtype=torch.int32),
        query_starts=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        logit_rows=every,
    )
    return model.logits(model.forward(batch, KVPool(spec, 4, CPU)))


@pytest.mark.parametrize("path", cpu_paths())
@pytest.mark.parametrize("name", ["demo", "llama-mqa-biases", "qwen3-moe-window-old"])
def test_logits_over_int8_pages_are_near_those_over_float32(
    path: registry.PathName, name: str, tmp_path: Path
) -> None:
    if name == "demo":
        with resources.as_file(resources.files("kvpaging") / "demo_model") as directory:
            whole, kept = (logits(directory, path, None, pages) for pages in ("float32", "int8"))
    else:
        make(case(name), tmp_path)
        whole, kept = (logits(tmp_path, path, None, pages) for pages in ("float32", "int8"))
    error = relative(kept - whole, whole)
    assert 0 < error < PAGES_BOUND, error


def relative(error: torch.Tensor, of: torch.Tensor) -> float:
    about_mean = of - of.mean(dim=1, keepdim=True)
    return float(error.double().square().mean().sqrt() / about_mean.double().square().mean().sqrt())


def test_logits_of_the_demo_model_are_near_those_of_whole_weights() -> None:
    directory = Path(str(resources.files("kvpaging") / "demo_model"))
    expected = logits(directory, "torch", None)
    for path in cpu_paths():
        error = relative(logits(directory, path, "int8") - expected, expected)
        assert 0 < error < LOGIT_BOUND, f"{path}: {error:.4f}"


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-moe"])
def test_all_paths_compute_the_same_int8_model(name: str, tmp_path: Path) -> None:
    make(case(name), tmp_path, dtype=torch.bfloat16)
    whole = logits(tmp_path, "torch", None)
    reference = logits(tmp_path, "torch", "int8")
    assert relative(reference - whole, whole) > 1e-4
    for path in cpu_paths():
        assert relative(logits(tmp_path, path, "int8") - reference, reference) < 1e-3


def test_the_option_reaches_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the loader that serves: other logits than whole weights give."""
    make(case("llama-gqa"), tmp_path, dtype=torch.bfloat16)
    models: list[CausalLM] = []

    def executor_of(model: CausalLM, *rest: Any, **named: Any) -> LocalExecutor:
        models.append(model)
        return LocalExecutor(model, *rest, **named)

    monkeypatch.setattr(loading, "LocalExecutor", executor_of)
    for quantization in (None, "int8"):
        options = EngineOptions(
            model=str(tmp_path),
            device="cpu",
            dtype="float32",
            threads=1,
            kv_cache_memory_bytes=4 * 2**20,
            quantization=quantization,
        )
        config, executor = loading.load_executor(options)
        assert config.quantization == quantization
        executor.close()
    hidden = torch.ones(1, read_model_config(tmp_path).hidden_size)
    whole, quantized = (model.logits(hidden) for model in models)
    assert not torch.equal(whole, quantized)


def test_embeddings_and_the_head_that_is_tied_to_them_stay_whole(tmp_path: Path) -> None:
    make(case("qwen2-tied"), tmp_path, dtype=torch.bfloat16)
    config = read_model_config(tmp_path)
    for path in cpu_paths():
        ops = registry.select(CPU, prefer=path, threads=1)
        checkpoint = Checkpoint(tmp_path)
        parameters = Parameters(checkpoint, ops, CPU, torch.bfloat16, quantization="int8")
        model = model_class(config)(config, parameters, 64)
        ids = torch.arange(config.vocab_size)
        table = torch.empty(config.vocab_size, config.hidden_size, dtype=torch.bfloat16)
        checkpoint.copy("model.embed_tokens.weight", table)
        assert torch.equal(model.embed(ids), table)


def test_a_weight_that_can_not_be_quantized_is_refused_by_name(tmp_path: Path) -> None:
    model = make(case("llama-gqa"), tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"int8: model\.layers\.1\.mlp\.down_proj.*infinities"):
        logits(tmp_path, "torch", "int8")
