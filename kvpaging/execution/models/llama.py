"""Llama 2, 3 and 3.x (Touvron et al. 2023, Dubey et al. 2024), and Mistral (Jiang et al. 2023).

Mistral is Llama with a sliding window in some releases, which its configuration says.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from kvpaging.execution.batch import DeviceBatch
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.model_config import ModelConfig
from kvpaging.execution.models.layers import Attention, CausalLM, GatedMLP
from kvpaging.execution.weights import Parameters


class LlamaLayer:
    """Pre-norm attention, then a pre-norm gated MLP."""

    def __init__(
        self, config: ModelConfig, index: int, cos_sin: torch.Tensor, parameters: Parameters
    ) -> None:
        self._ops = parameters.ops
        self._eps = config.rms_norm_eps
        self.input_norm = parameters.vector("input_layernorm.weight", config.hidden_size)
        self._attention = Attention(config, index, cos_sin, parameters.at("self_attn."))
        self._mlp_norm = parameters.vector("post_attention_layernorm.weight", config.hidden_size)
        self._mlp = GatedMLP(config, parameters.at("mlp."))

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, batch: DeviceBatch, kv: KVPool
    ) -> torch.Tensor:
        """See `DecoderLayer`."""
        x = self._attention(x, batch, kv)
        x = self._ops.add_rms_norm(x, residual, self._mlp_norm, self._eps)
        return self._mlp(x)


class LlamaForCausalLM(CausalLM):
    """Llama and Mistral."""

    make_layer = LlamaLayer
    ignored: ClassVar[tuple[str, ...]] = (
        # Frequencies that old converters wrote; they follow from config.json.
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )
