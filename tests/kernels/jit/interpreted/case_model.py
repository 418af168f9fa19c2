"""A whole model on the Triton path, in Triton's interpreter; run by test_interpreter.py."""

from __future__ import annotations

from pathlib import Path

import jit_cases
import kernel_cases
import pytest
import torch
from checkpoints import CASES, ORIGINAL_LENGTH, make, reference_logits
from plan_driver import PlanDriver, RecordingModel

from kvpaging.base.kv_spec import KVSpec
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.local_executor import LocalExecutor
from kvpaging.execution.model_config import read_model_config
from kvpaging.execution.models.registry import model_class
from kvpaging.execution.weights import Checkpoint, Parameters

CPU = torch.device("cpu")
PROMPTS = [[(7 * i + 3) % 128 for i in range(37)], [9]]
NUM_TOKENS = 3


@pytest.mark.parametrize("name", ["llama-mqa-biases", "qwen3-moe-window-old"])
def test_logits_are_those_of_transformers_whatever_the_chunks_and_pages(
    name: str, tmp_path: Path
) -> None:
    reference = make(next(case for case in CASES if case.name == name), tmp_path)
    config = read_model_config(tmp_path)
    ops = jit_cases.make_ops("cpu")
    parameters = Parameters(Checkpoint(tmp_path), ops, CPU, torch.float32)
    model = model_class(config)(config, parameters, ORIGINAL_LENGTH)
    results = []
    for page_size, chunk in ((4, 20), (16, 1_000)):
        spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, page_size, "float32")
        num_pages = len(PROMPTS) * -(-ORIGINAL_LENGTH // page_size)
        pool = KVPool(spec, num_pages, CPU)
        pool.pages.fill_(255)  # NaN, whatever is read from it
        recording = RecordingModel(model)
        driver = PlanDriver(
            LocalExecutor(recording, pool, ops),
            page_size=page_size,
            num_pages=num_pages,
            recording=recording,
        )
        tracks = [driver.track(prompt) for prompt in PROMPTS]
        driver.finish(tracks, NUM_TOKENS, chunk=chunk)
        results.append([torch.stack(track.logits) for track in tracks])
        for track, logits in zip(tracks, results[-1], strict=True):
            expected = reference_logits(reference, track.tokens)[len(track.prompt) - 1 : -1]
            assert kernel_cases.relative_error(logits, expected) < 1e-5
    assert all(map(torch.equal, *results))
