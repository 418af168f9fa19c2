"""Every family through the whole engine, short of pages and in chunks, against transformers.

The native path must also give the same bits as an engine with room for everything, in float32 and
bfloat16.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import CASES, ORIGINAL_LENGTH, Case, make, reference_logits
from ops_paths import cpu_paths

from kvpaging.base.config import EngineOptions
from kvpaging.base.kv_spec import KVSpec
from kvpaging.engine.engine import Completion, Engine
from kvpaging.execution.model_config import read_model_config
from kvpaging.scheduling.request import SamplingParams

TOLERANCE = 1e-4
NUM_TOKENS = 64
PROMPTS = [[(7 * i + k) % 125 + 3 for i in range(30 + 7 * k)] for k in range(3)]
GREEDY = SamplingParams(
    max_new_tokens=NUM_TOKENS,
    seed=0,
    temperature=0.0,
    ignore_eos=True,
    logprobs=2,
    prompt_logprobs=2,
)
PAGE_SIZE = {"float32": 4, "bfloat16": 16}


def make_engine(directory: Path, path: str, dtype: str, *, num_pages: int, budget: int) -> Engine:
    config = read_model_config(directory)
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, PAGE_SIZE[dtype], dtype)
    return Engine.from_options(
        EngineOptions(
            model=str(directory),
            device="cpu",
            dtype=dtype,
            kernels=path,
            threads=1,
            page_size=spec.page_size,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            max_model_len=ORIGINAL_LENGTH,
            kv_cache_memory_bytes=(num_pages + 1) * spec.page_bytes,
        )
    )


def squeezed(directory: Path, path: str, dtype: str) -> list[Completion]:
    """All prompts at once, in an engine with pages for little more than one of them."""
    num_pages = ORIGINAL_LENGTH // PAGE_SIZE[dtype] + 2
    engine = make_engine(directory, path, dtype, num_pages=num_pages, budget=11)
    try:
        completions = [outputs[0] for outputs in engine.generate(PROMPTS, GREEDY)]
        stats = engine.stats()
        assert stats.num_preemptions > 0
        assert stats.num_recomputed_tokens > 0
    finally:
        engine.close()
    return completions


def roomy(directory: Path, path: str, dtype: str) -> list[Completion]:
    """One prompt after the other, each in one chunk."""
    engine = make_engine(directory, path, dtype, num_pages=1000, budget=512)
    try:
        return [engine.generate([prompt], GREEDY)[0][0] for prompt in PROMPTS]
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_through_the_engine(case: Case, tmp_path: Path) -> None:
    reference = make(case, tmp_path)
    for path in cpu_paths():
        completions = squeezed(tmp_path, path, "float32")
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            expected = reference_logits(reference, [*prompt, *completion.token_ids])
            agree(completion, expected[len(prompt) - 1 : -1])
            agree_on_prompt(completion, prompt, expected[: len(prompt) - 1])
        if path == "native":
            assert [(c.samples, c.prompt_samples) for c in completions] == [
                (c.samples, c.prompt_samples) for c in roomy(tmp_path, path, "float32")
            ]
            assert [
                (c.samples, c.prompt_samples) for c in squeezed(tmp_path, path, "bfloat16")
            ] == [(c.samples, c.prompt_samples) for c in roomy(tmp_path, path, "bfloat16")]


def agree(completion: Completion, logits: torch.Tensor) -> None:
    """Tokens where the first two logits are clearly apart, and the log-probabilities."""
    assert len(completion.samples) == NUM_TOKENS
    scale = logits.abs().amax(dim=1)
    best = logits.topk(2, dim=1)
    is_clear = (best.values[:, 0] - best.values[:, 1]) > TOLERANCE * scale
    assert is_clear.sum() > NUM_TOKENS * 0.9, "a test that can't fail"
    logprobs = logits.double().log_softmax(dim=1)
    for i, sample in enumerate(completion.samples):
        if is_clear[i]:
            assert sample.token_id == best.indices[i, 0]
        assert sample.logprob == pytest.approx(
            float(logprobs[i, sample.token_id]), abs=2 * TOLERANCE * float(scale[i])
        )


def agree_on_prompt(completion: Completion, prompt: list[int], logits: torch.Tensor) -> None:
    """The log-probabilities of all prompt tokens but the first, and of the two most probable."""
    assert [sample.token_id for sample in completion.prompt_samples] == prompt[1:]
    logprobs = logits.double().log_softmax(dim=1)
    for row, tolerance, sample in zip(
        logprobs, 2 * TOLERANCE * logits.abs().amax(dim=1), completion.prompt_samples, strict=True
    ):
        assert sample.logprob == pytest.approx(float(row[sample.token_id]), abs=float(tolerance))
        top = [logprob for _, logprob in sample.top]
        assert top == pytest.approx(row.topk(2).values.tolist(), abs=float(tolerance))
        for token_id, logprob in sample.top:
            assert logprob == pytest.approx(float(row[token_id]), abs=float(tolerance))
