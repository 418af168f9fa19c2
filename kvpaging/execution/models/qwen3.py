"""Qwen3 (Yang et al. 2025): each head of queries and keys has an RMS norm before it is turned."""

from __future__ import annotations

import torch

from kvpaging.execution.model_config import ModelConfig
from kvpaging.execution.models.layers import Attention, CausalLM, GatedMLP, PreNormLayer
from kvpaging.execution.weights import Parameters


class Qwen3ForCausalLM(CausalLM):
    """Qwen3, dense."""

    @staticmethod
    def make_layer(
        config: ModelConfig, index: int, cos_sin: torch.Tensor, parameters: Parameters
    ) -> PreNormLayer:
        """Build layer `index` from its parameters."""
        attention = Attention(
            config, index, cos_sin, parameters.at("self_attn."), has_head_norms=True
        )
        mlp = GatedMLP(config, parameters.at("mlp."))
        return PreNormLayer(config, parameters, attention, mlp)
