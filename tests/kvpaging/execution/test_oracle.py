"""Every family against transformers: the same logits, the same greedy tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import CASES, ORIGINAL_LENGTH, Case, make, reference_logits
from ops_paths import cpu_paths
from plan_driver import PlanDriver, RecordingModel

from kernels import registry
from kvpaging.base.kv_spec import KVSpec
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.local_executor import LocalExecutor
from kvpaging.execution.model_config import read_model_config
from kvpaging.execution.models.layers import CausalLM
from kvpaging.execution.models.registry import FAMILIES, model_class
from kvpaging.execution.weights import Checkpoint, Parameters

CPU = torch.device("cpu")
TOLERANCE = 1e-4
NUM_TOKENS = 64
PROMPTS = [
    [(7 * i + 3) % 128 for i in range(37)],
    [(11 * i * i + 5) % 128 for i in range(21)],
    [9],
]


def load(directory: Path, path: registry.PathName) -> tuple[CausalLM, registry.Ops]:
    config = read_model_config(directory)
    ops = registry.select(CPU, prefer=path, threads=1)
    parameters = Parameters(Checkpoint(directory), ops, CPU, torch.float32)
    model = model_class(config)(config, parameters, ORIGINAL_LENGTH)
    parameters.finish(model.ignored_tensors())
    return model, ops


def pool_of(model: CausalLM, page_size: int, num_pages: int) -> KVPool:
    config = model.config
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, page_size, "float32")
    pool = KVPool(spec, num_pages, CPU)
    pool.pages.fill_(255)  # NaN: what nobody wrote must never show
    return pool


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_and_greedy_tokens_are_those_of_transformers(case: Case, tmp_path: Path) -> None:
    reference = make(case, tmp_path)
    for path in cpu_paths():
        model, ops = load(tmp_path, path)
        variants = []
        for page_size, chunk in ((4, 5), (16, 1_000), (64, 16)):
            recording = RecordingModel(model)
            num_pages = len(PROMPTS) * -(-ORIGINAL_LENGTH // page_size)
            pool = pool_of(model, page_size, num_pages)
            driver = PlanDriver(
                LocalExecutor(recording, pool, ops),
                page_size=page_size,
                num_pages=num_pages,
                recording=recording,
            )
            tracks = [driver.track(prompt) for prompt in PROMPTS]
            driver.finish(tracks, NUM_TOKENS, chunk=chunk)
            variants.append([torch.stack(track.logits) for track in tracks])
            for track in tracks:
                expected = reference_logits(reference, track.tokens)[len(track.prompt) - 1 : -1]
                agree(torch.stack(track.logits), track.output, expected)
        if ops.exact:  # pages, chunks and batch mates change no bit
            for variant in variants[1:]:
                assert all(map(torch.equal, variant, variants[0]))


def agree(logits: torch.Tensor, tokens: list[int], expected: torch.Tensor) -> None:
    """Logits within the tolerance, and tokens where the first two are further apart than it."""
    assert len(logits) == len(tokens) == len(expected) == NUM_TOKENS
    scale = expected.abs().amax(dim=1, keepdim=True)
    assert ((logits - expected).abs() / scale).max() < TOLERANCE
    best = expected.topk(2, dim=1)
    is_clear = (best.values[:, 0] - best.values[:, 1]) > TOLERANCE * scale[:, 0]
    assert is_clear.sum() > NUM_TOKENS * 0.9, "a test that can't fail"
    assert torch.equal(torch.tensor(tokens)[is_clear], best.indices[is_clear, 0])


def test_every_architecture_has_a_case() -> None:
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    mapping = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    covered = {mapping[type(AutoConfig.for_model(case.model_type))].__name__ for case in CASES}
    assert covered == set(FAMILIES)
