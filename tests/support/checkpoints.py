"""Tiny random checkpoints of every family, written by transformers, and what it computes from them.

`CASES` is the list that the oracle tests run over. `make` writes one to a directory and returns the
transformers model as the reference.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ORIGINAL_LENGTH = 128
"""Positions that a case's checkpoint was "trained" for; tests stay within them."""

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": ORIGINAL_LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """One configuration of one family."""

    name: str
    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    old_style: bool = False
    """Rewrite config.json as transformers 4 wrote it."""

    def __str__(self) -> str:
        return self.name


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **fields}}


def _longrope(half: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(half)],
        "long_factor": [2.0 + 0.5 * i for i in range(half)],
        "original_max_position_embeddings": ORIGINAL_LENGTH,
    }


_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 9}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32}

CASES: tuple[Case, ...] = (
    Case("llama-gqa", "llama"),
    Case(
        "llama-mha-tied-old", "llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}, True
    ),
    Case(
        "llama-mqa-biases",
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    Case(
        "llama-head-80",
        "llama",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80},
    ),
    Case("llama-linear-old", "llama", _rope("linear", factor=4.0), True),
    Case("llama-dynamic", "llama", _rope("dynamic", factor=4.0)),
    Case(
        "llama-llama3-old",
        "llama",
        {
            "head_dim": 64,
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        },
        True,
    ),
    Case("llama-yarn", "llama", _rope("yarn", **_YARN)),
    Case(
        "llama-yarn-mscale-old",
        "llama",
        _rope("yarn", **_YARN, mscale=0.7, mscale_all_dim=0.3, beta_fast=16.0, truncate=False),
        True,
    ),
    Case("llama-longrope", "llama", {"rope_parameters": _longrope(8)}),
    Case("mistral-window", "mistral", {"sliding_window": 11, "head_dim": 24}),
    Case("mistral-no-window-old", "mistral", {"sliding_window": None}, True),
    Case("qwen2-tied", "qwen2", {"tie_word_embeddings": True}),
    Case(
        "qwen2-upper-windows-old",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        True,
    ),
    Case("qwen3", "qwen3", {"head_dim": 32}),
    Case("qwen3-head-96-tied-old", "qwen3", {"head_dim": 96, "tie_word_embeddings": True}, True),
    Case("gemma2-old", "gemma2", _GEMMA, True),
    Case(
        "gemma2-uncapped-bias",
        "gemma2",
        {
            **_GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
        },
    ),
    Case(
        "gemma3",
        "gemma3_text",
        {
            **_GEMMA,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
            },
        },
    ),
    Case(
        "gemma3-pattern-untied-old",
        "gemma3_text",
        {
            **_GEMMA,
            "num_hidden_layers": 3,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": False,
        },
        True,
    ),
    Case(
        "gemma3-that-sees",
        "gemma3",
        {
            "text_config": {
                **SMALL,
                **_GEMMA,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    Case("phi3-window-old", "phi3", {"sliding_window": 10}, True),
    Case(
        "phi3-longrope-partial",
        "phi3",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": ORIGINAL_LENGTH,
            "max_position_embeddings": 4 * ORIGINAL_LENGTH,
            "rope_parameters": {**_longrope(4), "partial_rotary_factor": 0.5},
        },
    ),
    Case(
        "phi3-longrope-old",
        "phi3",
        {
            "original_max_position_embeddings": ORIGINAL_LENGTH,
            "max_position_embeddings": 4 * ORIGINAL_LENGTH,
            "rope_parameters": _longrope(8),
        },
        True,
    ),
    Case(
        "qwen3-moe",
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    Case(
        "qwen3-moe-window-old",
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": 8,
        },
        True,
    ),
    Case("mixtral-window", "mixtral", {"num_local_experts": 4, "sliding_window": 9}),
    Case("mixtral-old", "mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}, True),
)


def case(name: str) -> Case:
    """The case of that name."""
    return next(each for each in CASES if each.name == name)


def make(
    case: Case,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
) -> torch.nn.Module:
    """Write the case's checkpoint to `directory`; returns the reference model in `dtype`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    is_wrapped = "text_config" in case.fields
    fields = case.fields if is_wrapped else {**SMALL, **case.fields}
    config = AutoConfig.for_model(case.model_type, **fields)
    family = AutoModelForImageTextToText if is_wrapped else AutoModelForCausalLM
    model = family.from_config(config, dtype=dtype, attn_implementation="eager")
    model.eval()
    _randomise(model, seed)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if case.old_style:
        path = directory / "config.json"
        path.write_text(json.dumps(as_transformers_4(json.loads(path.read_text()))))
    return model


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights at which every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            value = noise * (1.5 / parameter.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            value = noise * 0.3
        else:  # a norm's weight, around what it starts with
            value = parameter.detach().float().mean() + 0.2 * noise
        parameter.data.copy_(value)


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 as version 4 would have written it."""
    config = {**config, "transformers_version": "4.44.2", "torch_dtype": config["dtype"]}
    del config["dtype"]
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = 1 + config["layer_types"].index("full_attention")
        rope = rope["full_attention"]
    config.pop("layer_types", None)
    scaling = dict(rope)
    config["rope_theta"] = scaling.pop("rope_theta")
    if "partial_rotary_factor" in scaling:
        config["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    if "original_max_position_embeddings" in config:
        scaling.pop("original_max_position_embeddings", None)
    kind = scaling.pop("rope_type")
    # "type" is what version 4 said first.
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}
    return config


@torch.inference_mode()
def reference_logits(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """Logits after each token, `[len(token_ids), V]` float32."""
    logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float()
