"""Qwen3-MoE (Yang et al. 2025): Qwen3 with experts in place of most layers' MLP."""

from __future__ import annotations

from typing import Final

import torch

from kvpaging.execution.model_config import ModelConfig
from kvpaging.execution.models.experts import ExpertNames, ExpertsMLP
from kvpaging.execution.models.layers import Attention, CausalLM, GatedMLP, PreNormLayer
from kvpaging.execution.weights import Parameters

_NAMES: Final = ExpertNames(gate="gate_proj", up="up_proj", down="down_proj")


class Qwen3MoeForCausalLM(CausalLM):
    """Qwen3-MoE."""

    @staticmethod
    def make_layer(
        config: ModelConfig, index: int, cos_sin: torch.Tensor, parameters: Parameters
    ) -> PreNormLayer:
        """Build layer `index` from its parameters."""
        attention = Attention(
            config, index, cos_sin, parameters.at("self_attn."), has_head_norms=True
        )
        experts, at_mlp = config.experts, parameters.at("mlp.")
        mlp: ExpertsMLP | GatedMLP
        if experts is not None and experts.sparse_layers[index]:
            mlp = ExpertsMLP(experts, config.hidden_size, at_mlp, _NAMES)
        else:
            mlp = GatedMLP(config, at_mlp)
        return PreNormLayer(config, parameters, attention, mlp)
