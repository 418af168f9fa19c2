"""Which class computes which architecture. Families are imported when they are asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from kvpaging.base.errors import UnsupportedModel
from kvpaging.execution.model_config import ModelConfig
from kvpaging.execution.models.layers import CausalLM

FAMILIES: Final[dict[str, tuple[str, str]]] = {
    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("llama", "LlamaForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
    "Gemma2ForCausalLM": ("gemma2", "Gemma2ForCausalLM"),
    "Gemma3ForCausalLM": ("gemma3", "Gemma3ForCausalLM"),
    "Gemma3ForConditionalGeneration": ("gemma3", "Gemma3ForConditionalGeneration"),
    "Phi3ForCausalLM": ("phi3", "Phi3ForCausalLM"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "MixtralForCausalLM": ("mixtral", "MixtralForCausalLM"),
}
"""Architecture of config.json -> module of this package and its class."""


def model_class(config: ModelConfig) -> type[CausalLM]:
    """The class for `config.architecture`. Raises `UnsupportedModel`."""
    if config.architecture not in FAMILIES:
        raise UnsupportedModel(
            f"architecture {config.architecture} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    module, name = FAMILIES[config.architecture]
    found: type[CausalLM] = getattr(import_module(f"{__package__}.{module}"), name)
    return found
