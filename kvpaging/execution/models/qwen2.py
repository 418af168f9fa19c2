"""Qwen2 and Qwen2.5 (Yang et al. 2024): biases on queries, keys and values.

Some configurations give the upper layers a sliding window.
"""

from __future__ import annotations

import torch

from kvpaging.execution.model_config import ModelConfig
from kvpaging.execution.models.layers import Attention, CausalLM, GatedMLP, PreNormLayer
from kvpaging.execution.weights import Parameters


class Qwen2ForCausalLM(CausalLM):
    """Qwen2 and Qwen2.5."""

    @staticmethod
    def make_layer(
        config: ModelConfig, index: int, cos_sin: torch.Tensor, parameters: Parameters
    ) -> PreNormLayer:
        """Build layer `index` from its parameters."""
        attention = Attention(config, index, cos_sin, parameters.at("self_attn."), qkv_bias=True)
        mlp = GatedMLP(config, parameters.at("mlp."))
        return PreNormLayer(config, parameters, attention, mlp)
