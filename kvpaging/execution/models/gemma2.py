"""Gemma 2 (Gemma Team 2024): norms before and after each part, soft caps, alternating windows.

Its norms multiply by one plus the weight, and the embedding is scaled by the square root of the
hidden size.
"""

from __future__ import annotations

from typing import ClassVar, Final

import torch

from kvpaging.execution.batch import DeviceBatch, LastRows
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.model_config import ModelConfig
from kvpaging.execution.models.layers import Attention, CausalLM, GatedMLP
from kvpaging.execution.weights import Parameters

NORM_WEIGHT_OFFSET: Final = 1.0


class Gemma2Layer:
    """Attention, then a gated MLP, each with a norm before and one after."""

    has_head_norms: ClassVar[bool] = False

    def __init__(
        self, config: ModelConfig, index: int, cos_sin: torch.Tensor, parameters: Parameters
    ) -> None:
        self._ops = parameters.ops
        self._eps = config.rms_norm_eps
        size = config.hidden_size
        self.input_norm = parameters.vector("input_layernorm.weight", size)
        self._attention = Attention(
            config,
            index,
            cos_sin,
            parameters.at("self_attn."),
            has_head_norms=self.has_head_norms,
            norm_weight_offset=NORM_WEIGHT_OFFSET,
        )
        self._attended_norm = parameters.vector("post_attention_layernorm.weight", size)
        self._mlp_norm = parameters.vector("pre_feedforward_layernorm.weight", size)
        self._mlp = GatedMLP(config, parameters.at("mlp."))
        self._output_norm = parameters.vector("post_feedforward_layernorm.weight", size)

    def attend(
        self, x: torch.Tensor, batch: DeviceBatch, kv: KVPool, last: LastRows | None
    ) -> torch.Tensor:
        """See `DecoderLayer`."""
        x = self._attention(x, batch, kv, last)
        return self._ops.rms_norm(
            x, self._attended_norm, self._eps, weight_offset=NORM_WEIGHT_OFFSET
        )

    def feed_forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """See `DecoderLayer`."""
        ops, eps, offset = self._ops, self._eps, NORM_WEIGHT_OFFSET
        x = ops.add_rms_norm(x, residual, self._mlp_norm, eps, weight_offset=offset)
        x = self._mlp(x)
        return ops.rms_norm(x, self._output_norm, eps, weight_offset=offset)


class Gemma2ForCausalLM(CausalLM):
    """Gemma 2."""

    norm_weight_offset: ClassVar[float] = NORM_WEIGHT_OFFSET
    make_layer = Gemma2Layer

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[T] -> [T, H]`, scaled by the square root of H in the model's own dtype."""
        rows = super().embed(token_ids)
        return rows.mul_(torch.tensor(self.config.hidden_size**0.5, dtype=rows.dtype))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[S, H] -> [S, V]` float32, softly capped where the configuration says so."""
        logits = super().logits(hidden)
        cap = self.config.logit_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
