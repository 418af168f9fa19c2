"""Phi-3 and Phi-3.5 (Abdin et al. 2024): fused projections; LongRoPE, in some partly rotary."""

from __future__ import annotations

import torch

from kvpaging.execution.model_config import ModelConfig
from kvpaging.execution.models.layers import Attention, CausalLM, GatedMLP, PreNormLayer
from kvpaging.execution.weights import Parameters


class Phi3ForCausalLM(CausalLM):
    """Phi-3 and Phi-3.5, text."""

    @staticmethod
    def make_layer(
        config: ModelConfig, index: int, cos_sin: torch.Tensor, parameters: Parameters
    ) -> PreNormLayer:
        """Build layer `index` from its parameters."""
        attention = Attention(
            config, index, cos_sin, parameters.at("self_attn."), fused_name="qkv_proj"
        )
        mlp = GatedMLP(config, parameters.at("mlp."), fused_name="gate_up_proj")
        return PreNormLayer(config, parameters, attention, mlp)
