"""Mixtral (Jiang et al. 2024): Mistral with experts in place of each layer's MLP."""

from __future__ import annotations

from typing import Final

import torch

from kvpaging.base.errors import ConfigError
from kvpaging.execution.model_config import ModelConfig
from kvpaging.execution.models.experts import ExpertNames, ExpertsMLP
from kvpaging.execution.models.layers import Attention, CausalLM, PreNormLayer
from kvpaging.execution.weights import Parameters

_NAMES: Final = ExpertNames(gate="w1", up="w3", down="w2")


class MixtralForCausalLM(CausalLM):
    """Mixtral."""

    @staticmethod
    def make_layer(
        config: ModelConfig, index: int, cos_sin: torch.Tensor, parameters: Parameters
    ) -> PreNormLayer:
        """Build layer `index` from its parameters."""
        if config.experts is None:
            raise ConfigError("config.json: a Mixtral without experts")
        attention = Attention(config, index, cos_sin, parameters.at("self_attn."))
        experts = parameters.at("block_sparse_moe.")
        mlp = ExpertsMLP(config.experts, config.hidden_size, experts, _NAMES)
        return PreNormLayer(config, parameters, attention, mlp)
