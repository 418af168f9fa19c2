"""What the families share: paged attention, the gated MLP, embedding and logits, the layers' loop.

Shapes: `T` tokens of the step, `H` hidden size, `HQ` and `HKV` heads, `D` head size, `I` the MLP's
inner size, `V` vocabulary. Knows no family by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final, Protocol

import torch

from kernels.ops import Linear, Ops
from kvpaging.execution.batch import DeviceBatch, LastRows
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.model_config import ModelConfig
from kvpaging.execution.rope import cos_sin_table
from kvpaging.execution.weights import Parameters

_TIED_HEAD: Final = r"lm_head\.weight"
"""Some tied checkpoints carry the embedding a second time under this name."""


class DecoderLayer(Protocol):
    """One layer in two parts: what tokens tell each other, and what each makes of it.

    Each part returns what is to be added to the residual; the sum is left to the next norm, which
    does both in one pass. `R` rows are all T, or those of `last`.
    """

    input_norm: torch.Tensor

    def attend(
        self, x: torch.Tensor, batch: DeviceBatch, kv: KVPool, last: LastRows | None
    ) -> torch.Tensor:
        """`x [T, H]` normalised; writes all keys and values to `kv`; returns `[R, H]`."""

    def feed_forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`x [R, H]`, which `residual [R, H]` takes up in place; returns `[R, H]`."""


class Attention:
    """Self-attention of one layer over the pages of its sequences."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        cos_sin: torch.Tensor,
        parameters: Parameters,
        *,
        fused_name: str | None = None,
        qkv_bias: bool = False,
        has_head_norms: bool = False,
        norm_weight_offset: float = 0.0,
    ) -> None:
        """Load the projections of layer `index` from `parameters` (at the attention's prefix).

        `fused_name` is set where the checkpoint keeps queries, keys and values as one tensor;
        `qkv_bias` where they have biases whatever the configuration says; `has_head_norms` where
        each head of queries and keys has an RMS norm.
        """
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self._ops = parameters.ops
        self._index = index
        self._cos_sin = cos_sin
        self._scale = config.attention_scale
        self._window = config.windows[index]
        self._soft_cap = config.attention_soft_cap
        self._norm_eps = config.rms_norm_eps
        self._norm_weight_offset = norm_weight_offset
        names, sizes = ["q_proj", "k_proj", "v_proj"], [query_size, kv_size, kv_size]
        if fused_name is not None:
            names, sizes = [fused_name], [sum(sizes)]
        bias = config.attention_bias
        self._qkv = parameters.linear(names, sizes, config.hidden_size, bias=bias or qkv_bias)
        self._q_norm: torch.Tensor | None = None
        self._k_norm: torch.Tensor | None = None
        if has_head_norms:
            self._q_norm = parameters.vector("q_norm.weight", config.head_dim)
            self._k_norm = parameters.vector("k_norm.weight", config.head_dim)
        self._output = parameters.linear(("o_proj",), (config.hidden_size,), query_size, bias=bias)

    def __call__(
        self, x: torch.Tensor, batch: DeviceBatch, kv: KVPool, last: LastRows | None
    ) -> torch.Tensor:
        """`[T, H] -> [R, H]`; writes the tokens' keys and values to their slots in `kv`.

        With `last` only its rows attend.
        """
        ops = self._ops
        pages = kv.layer(self._index)
        query = ops.rope_store(
            ops.linear(x, self._qkv),  # [T, (HQ + 2 HKV) * D]
            batch.positions,
            self._cos_sin,
            pages,
            batch.slot_mapping,
            q_norm=self._q_norm,
            k_norm=self._k_norm,
            norm_eps=self._norm_eps,
            norm_weight_offset=self._norm_weight_offset,
        )
        if last is not None:
            query = query.index_select(0, last.rows)
        seen = batch if last is None else last
        attended = ops.paged_attention(
            query,
            pages,
            seen.page_tables,
            seen.seq_lens,
            seen.query_starts,
            scale=self._scale,
            window=self._window,
            soft_cap=self._soft_cap,
        )  # [R, HQ, D]
        return ops.linear(attended.flatten(1), self._output)


class GatedMLP:
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(
        self, config: ModelConfig, parameters: Parameters, *, fused_name: str | None = None
    ) -> None:
        """Load from `parameters` (at the MLP's prefix); `fused_name`: gate and up as one tensor."""
        inner, bias = config.intermediate_size, config.mlp_bias
        self._ops = parameters.ops
        self._activation = (
            parameters.ops.silu_mul if config.activation == "silu" else parameters.ops.gelu_mul
        )
        if fused_name is None:
            self._gate_up = parameters.linear(
                ("gate_proj", "up_proj"), (inner, inner), config.hidden_size, bias=bias
            )
        else:
            self._gate_up = parameters.linear(
                (fused_name,), (2 * inner,), config.hidden_size, bias=bias
            )
        self._down = parameters.linear(("down_proj",), (config.hidden_size,), inner, bias=bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, H] -> [T, H]`."""
        ops = self._ops
        return ops.linear(self._activation(ops.linear(x, self._gate_up)), self._down)


class PreNormLayer:
    """Attention, then an MLP, each after a norm: the layer of most families."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        attention: Attention,
        mlp: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Load the norms from `parameters` (at the layer's prefix)."""
        self._ops = parameters.ops
        self._eps = config.rms_norm_eps
        self._attention = attention
        self._mlp = mlp
        self.input_norm = parameters.vector("input_layernorm.weight", config.hidden_size)
        self._mlp_norm = parameters.vector("post_attention_layernorm.weight", config.hidden_size)

    def attend(
        self, x: torch.Tensor, batch: DeviceBatch, kv: KVPool, last: LastRows | None
    ) -> torch.Tensor:
        """See `DecoderLayer`."""
        return self._attention(x, batch, kv, last)

    def feed_forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """See `DecoderLayer`."""
        x = self._ops.add_rms_norm(x, residual, self._mlp_norm, self._eps)
        return self._mlp(x)


class CausalLM:
    """Embedding, layers, final norm, logits. A family gives its layer and what differs."""

    ignored: ClassVar[tuple[str, ...]] = ()
    """Regular expressions of tensors that checkpoints may hold and this family does not need."""
    norm_weight_offset: ClassVar[float] = 0.0

    def __init__(self, config: ModelConfig, parameters: Parameters, max_model_len: int) -> None:
        """Take the parameters in forward order; RoPE is fixed for `max_model_len`."""
        self.config = config
        self._ops: Ops = parameters.ops
        self._embedding = Embedding(config, parameters)
        tables = [cos_sin_table(rope, max_model_len, parameters.device) for rope in config.ropes]
        self._layers = [
            self.make_layer(
                config, index, tables[config.rope_of_layer[index]], parameters.at(_layer(index))
            )
            for index in range(config.num_layers)
        ]
        final_norm = parameters.vector("model.norm.weight", config.hidden_size)
        self._next_norms = [*(layer.input_norm for layer in self._layers[1:]), final_norm]

    def ignored_tensors(self) -> tuple[str, ...]:
        """Regular expressions of the checkpoint's tensors that nothing here needs."""
        return (*self.ignored, _TIED_HEAD) if self.config.tie_word_embeddings else self.ignored

    @staticmethod
    def make_layer(
        config: ModelConfig, index: int, cos_sin: torch.Tensor, parameters: Parameters
    ) -> DecoderLayer:
        """Build layer `index` from its parameters."""
        raise NotImplementedError

    def forward(self, batch: DeviceBatch, kv: KVPool) -> torch.Tensor:
        """Hidden states `[R, H]` of the step's tokens, or of the batch's `last_rows`.

        Writes the keys and values of all tokens to `kv`.
        """
        return self.layers(self.embed(batch.token_ids), batch, kv)

    def layers(self, residual: torch.Tensor, batch: DeviceBatch, kv: KVPool) -> torch.Tensor:
        """The same from embedded tokens `[T, H]`, which are used up; looks at no token id."""
        ops, eps, offset = self._ops, self.config.rms_norm_eps, self.norm_weight_offset
        x = ops.rms_norm(residual, self._layers[0].input_norm, eps, weight_offset=offset)
        for layer, next_norm in zip(self._layers, self._next_norms, strict=True):
            last = batch.last_rows if layer is self._layers[-1] else None
            x = layer.attend(x, batch, kv, last)
            if last is not None:
                residual = residual.index_select(0, last.rows)
            x = layer.feed_forward(x, residual)
            x = ops.add_rms_norm(x, residual, next_norm, eps, weight_offset=offset)
        return x

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[T] -> [T, H]`, memory of its own."""
        return self._embedding.rows(token_ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[S, H] -> [S, V]` float32."""
        return self._embedding.logits(hidden)


class Embedding:
    """Token embedding and LM head; one weight where they are tied."""

    def __init__(self, config: ModelConfig, parameters: Parameters) -> None:
        """Load `model.embed_tokens`, and `lm_head` where it isn't the same weight."""
        size = (config.vocab_size, config.hidden_size)
        self._ops = parameters.ops
        self._table: torch.Tensor | None = None
        if config.tie_word_embeddings:
            self._head: Linear = parameters.whole_linear("model.embed_tokens", *size)
        else:
            self._table = parameters.matrix("model.embed_tokens.weight", *size)
            self._head = parameters.linear(("lm_head",), (config.vocab_size,), config.hidden_size)

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[T] -> [T, H]`."""
        if self._table is None:
            return self._head.rows(token_ids)
        return self._table.index_select(0, token_ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[S, H] -> [S, V]` float32."""
        return self._ops.linear_float32(hidden, self._head)


def _layer(index: int) -> str:
    return f"model.layers.{index}."
