"""Llama 2, 3 and 3.x (Touvron et al. 2023, Dubey et al. 2024), and Mistral (Jiang et al. 2023).

Mistral is Llama with a sliding window in some releases, which its configuration says.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from kvpaging.execution.model_config import ModelConfig
from kvpaging.execution.models.layers import Attention, CausalLM, GatedMLP, PreNormLayer
from kvpaging.execution.weights import Parameters


class LlamaForCausalLM(CausalLM):
    """Llama and Mistral."""

    ignored: ClassVar[tuple[str, ...]] = (
        # Frequencies that old converters wrote; they follow from config.json.
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )

    @staticmethod
    def make_layer(
        config: ModelConfig, index: int, cos_sin: torch.Tensor, parameters: Parameters
    ) -> PreNormLayer:
        """Build layer `index` from its parameters."""
        attention = Attention(config, index, cos_sin, parameters.at("self_attn."))
        mlp = GatedMLP(config, parameters.at("mlp."))
        return PreNormLayer(config, parameters, attention, mlp)
