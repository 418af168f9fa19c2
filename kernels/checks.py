"""The checks of all paths, in one place: shapes, dtypes, strides and devices.

O(1) each and always on: behind them stand raw pointers. What lies *in* the tensors (page ids,
slots, lengths) is the caller's promise. Docstrings of the operations: `kernels.ops.Ops`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NoReturn

import torch

from kernels.errors import ShapeError
from kernels.ops import QUANTISED, Experts, KVPages, Linear, Ops, Work
from kernels.quantization import MAX_INT8_FEATURES

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CheckedOps:
    """An `Ops` that refuses what doesn't fit, so that `inner` never sees it."""

    def __init__(self, inner: Ops, device: torch.device | str) -> None:
        self.inner = inner
        self.name = inner.name
        self.exact = inner.exact
        self.page_dtypes = inner.page_dtypes
        self.device = torch.device(device)
        # Half the cost of looking at `tensor.device.type`, several times a call.
        self._is_here = operator.attrgetter("is_cuda" if self.device.type == "cuda" else "is_cpu")

    def capture(self, work: Work) -> Work | None:
        return self.inner.capture(work)

    def prepare_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        self._floats("weight", weight, 2)
        if bias is not None:
            self._vector("bias", bias, weight.shape[0], weight.dtype)
        return self.inner.prepare_linear(weight, bias)

    def prepare_int8_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        self._floats("weight", weight, 2)
        if weight.shape[1] > MAX_INT8_FEATURES:
            raise ShapeError(
                f"weight has {weight.shape[1]} columns; an int8 weight has at most "
                f"{MAX_INT8_FEATURES}"
            )
        if bias is not None:
            self._vector("bias", bias, weight.shape[0], weight.dtype)
        return self.inner.prepare_int8_linear(weight, bias)

    def prepare_experts(self, weights: Sequence[Linear]) -> Experts:
        if not weights:
            raise ShapeError("weights is empty; wanted: at least one expert")
        kinds = [_kind(weight) for weight in weights]
        for expert, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise ShapeError(f"weights[{expert}] is {kind}; wanted: {kinds[0]}, as weights[0]")
        return self.inner.prepare_experts(weights)

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        self._factor(x, weight)
        return self.inner.linear(x, weight)

    def linear_float32(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        self._factor(x, weight)
        return self.inner.linear_float32(x, weight)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, weight_offset: float = 0.0
    ) -> torch.Tensor:
        self._rows("x", x, weight.shape[0])
        self._floats("weight", weight, 1)
        return self.inner.rms_norm(x, weight, eps, weight_offset=weight_offset)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_offset: float = 0.0,
    ) -> torch.Tensor:
        self._rows("x", x, weight.shape[0])
        self._rows("residual", residual, weight.shape[0])
        self._floats("weight", weight, 1)
        if x.shape[0] != residual.shape[0] or x.dtype != residual.dtype:
            _refuse("residual", residual, f"like x, {_shown(x)}")
        return self.inner.add_rms_norm(x, residual, weight, eps, weight_offset=weight_offset)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        self._gated(gate_up)
        return self.inner.silu_mul(gate_up)

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        self._gated(gate_up)
        return self.inner.gelu_mul(gate_up)

    def rope_store(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        pages: KVPages,
        slot_mapping: torch.Tensor,
        *,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        norm_eps: float = 0.0,
        norm_weight_offset: float = 0.0,
    ) -> torch.Tensor:
        _, num_kv_heads, _, head_dim = self._pages(pages, qkv.dtype)
        self._floats("qkv", qkv, 2)
        num_tokens, width = qkv.shape
        num_heads, rest = divmod(width, head_dim)
        if rest or num_heads <= 2 * num_kv_heads or (num_heads - 2 * num_kv_heads) % num_kv_heads:
            _refuse("qkv", qkv, f"(HQ + 2 * {num_kv_heads}) * {head_dim} wide, HQ a multiple")
        self._vector("positions", positions, num_tokens, torch.int32)
        self._vector("slot_mapping", slot_mapping, num_tokens, torch.int64)
        self._place("cos_sin", cos_sin)
        if (
            cos_sin.dim() != 2
            or cos_sin.dtype != torch.float32
            or not cos_sin.is_contiguous()
            or cos_sin.shape[1] % 2
            or cos_sin.shape[1] > head_dim
        ):
            _refuse("cos_sin", cos_sin, f"float32 [max_positions, even, <= {head_dim}]")
        if q_norm is not None:
            self._floats("q_norm", q_norm, 1)
            self._vector("q_norm", q_norm, head_dim, q_norm.dtype)
        if k_norm is not None:
            self._floats("k_norm", k_norm, 1)
            self._vector("k_norm", k_norm, head_dim, k_norm.dtype)
        return self.inner.rope_store(
            qkv,
            positions,
            cos_sin,
            pages,
            slot_mapping,
            q_norm=q_norm,
            k_norm=k_norm,
            norm_eps=norm_eps,
            norm_weight_offset=norm_weight_offset,
        )

    def store_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: KVPages,
        slot_mapping: torch.Tensor,
    ) -> None:
        _, num_kv_heads, _, head_dim = self._pages(pages, key.dtype)
        for name, rows in (("key", key), ("value", value)):
            self._floats(name, rows, 3)
            if (
                rows.dtype is not key.dtype
                or rows.shape != (key.shape[0], num_kv_heads, head_dim)
                or rows.stride(1) != head_dim
            ):
                _refuse(name, rows, f"{key.dtype} [T, {num_kv_heads}, {head_dim}], dense rows")
        self._vector("slot_mapping", slot_mapping, key.shape[0], torch.int64)
        self.inner.store_kv(key, value, pages, slot_mapping)

    def paged_attention(
        self,
        query: torch.Tensor,
        pages: KVPages,
        page_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_starts: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._attention(query, pages, page_tables, seq_lens, query_starts, window, soft_cap, sinks)
        return self.inner.paged_attention(
            query,
            pages,
            page_tables,
            seq_lens,
            query_starts,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
        )

    def paged_attention_state(
        self,
        query: torch.Tensor,
        pages: KVPages,
        page_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_starts: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._attention(query, pages, page_tables, seq_lens, query_starts, window, soft_cap, sinks)
        return self.inner.paged_attention_state(
            query,
            pages,
            page_tables,
            seq_lens,
            query_starts,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
        )

    def merge_state(
        self, out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._floats("out_a", out_a, 3)
        if not out_a.is_contiguous():
            _refuse("out_a", out_a, "a dense [T, HQ, D]")
        self._like("out_b", out_b, out_a.shape, out_a.dtype)
        self._like("lse_a", lse_a, out_a.shape[:2], torch.float32)
        self._like("lse_b", lse_b, out_a.shape[:2], torch.float32)
        return self.inner.merge_state(out_a, lse_a, out_b, lse_b)

    def grouped_linear(
        self, x: torch.Tensor, experts: Experts, expert_of_row: torch.Tensor
    ) -> torch.Tensor:
        self._factor(x, experts)
        self._vector("expert_of_row", expert_of_row, x.shape[0], torch.int64)
        return self.inner.grouped_linear(x, experts, expert_of_row)

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        seeds: torch.Tensor,
        output_indices: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        self._logits(logits)
        num_rows = logits.shape[0]
        self._vector("temperature", temperature, num_rows, torch.float32)
        self._vector("top_k", top_k, num_rows, torch.int32)
        self._vector("top_p", top_p, num_rows, torch.float32)
        self._vector("min_p", min_p, num_rows, torch.float32)
        self._vector("seeds", seeds, num_rows, torch.int64)
        self._vector("output_indices", output_indices, num_rows, torch.int32)
        self._vector("positions", positions, num_rows, torch.int32)
        return self.inner.sample(
            logits, temperature, top_k, top_p, min_p, seeds, output_indices, positions
        )

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        self._logits(logits)
        return self.inner.log_softmax(logits)

    def copy_pages(self, pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
        self._pool("pool", pool)
        self._vector("sources", sources, sources.shape[0], torch.int64)
        self._vector("targets", targets, sources.shape[0], torch.int64)
        self.inner.copy_pages(pool, sources, targets)

    def swap_out(
        self, pool: torch.Tensor, host: torch.Tensor, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        self._swap(pool, host, pages, places)
        self.inner.swap_out(pool, host, pages, places)

    def swap_in(
        self, pool: torch.Tensor, host: torch.Tensor, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        self._swap(pool, host, pages, places)
        self.inner.swap_in(pool, host, pages, places)

    def _attention(
        self,
        query: torch.Tensor,
        pages: KVPages,
        page_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_starts: torch.Tensor,
        window: int | None,
        soft_cap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        _, num_kv_heads, _, head_dim = self._pages(pages, query.dtype)
        self._floats("query", query, 3)
        _, num_heads, width = query.shape
        if (
            width != head_dim
            or num_heads == 0
            or num_heads % num_kv_heads
            or query.stride(1) != head_dim
        ):
            _refuse("query", query, f"[T, a multiple of {num_kv_heads}, {head_dim}]")
        num_seqs = page_tables.shape[0]
        self._place("page_tables", page_tables)
        if page_tables.dim() != 2 or page_tables.dtype != torch.int32 or page_tables.stride(1) != 1:
            _refuse("page_tables", page_tables, "int32 [B, max_pages]")
        self._vector("seq_lens", seq_lens, num_seqs, torch.int32)
        self._vector("query_starts", query_starts, num_seqs + 1, torch.int32)
        if sinks is not None:
            self._vector("sinks", sinks, num_heads, torch.float32)
        if window is not None and window < 1:
            raise ShapeError(f"window is {window}, but a query sees at least itself")
        if soft_cap is not None and soft_cap <= 0:
            raise ShapeError(f"soft_cap is {soft_cap}, must be positive")

    def _pool(self, name: str, pool: torch.Tensor) -> None:
        self._place(name, pool)
        if pool.dim() < 2 or not pool[:1].is_contiguous():
            _refuse(name, pool, "[num_pages, ...] with contiguous pages")

    def _swap(
        self, pool: torch.Tensor, host: torch.Tensor, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        self._pool("pool", pool)
        if (
            not host.is_cpu
            or host.dtype is not pool.dtype
            or host.shape[1:] != pool.shape[1:]
            or not host[:1].is_contiguous()
            or (pool.is_cuda and not host.is_pinned())
        ):
            kind = "pinned memory" if pool.is_cuda else "memory"
            _refuse("host", host, f"in the host's {kind}, with dense pages like {_shown(pool)}")
        self._vector("pages", pages, pages.shape[0], torch.int64)
        self._vector("places", places, pages.shape[0], torch.int64)

    def _like(self, name: str, tensor: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        if (
            not self._is_here(tensor)
            or tensor.dtype is not dtype
            or tensor.shape != shape
            or not tensor.is_contiguous()
        ):
            _refuse(name, tensor, f"a dense {dtype} {list(shape)} on {self.device}")

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        if not self._is_here(tensor):
            _refuse(name, tensor, f"on {self.device}, the device of {self.name}")

    def _floats(self, name: str, tensor: torch.Tensor, dim: int) -> None:
        """A float tensor of `dim` dimensions whose last is dense."""
        if (
            not self._is_here(tensor)
            or tensor.dtype not in FLOAT_DTYPES
            or tensor.dim() != dim
            or tensor.stride(-1) != 1
        ):
            _refuse(
                name,
                tensor,
                f"float32, bfloat16 or float16 on {self.device}, the device of {self.name},"
                f" of {dim} dimensions, dense in the last",
            )

    def _rows(self, name: str, tensor: torch.Tensor, width: int) -> None:
        self._floats(name, tensor, 2)
        if tensor.shape[1] != width:
            _refuse(name, tensor, f"{width} wide")

    def _factor(self, x: torch.Tensor, weight: Linear | Experts) -> None:
        self._rows("x", x, weight.in_features)
        if x.dtype is not weight.dtype:
            _refuse("x", x, f"{weight.dtype}, which its weight is for")

    def _gated(self, gate_up: torch.Tensor) -> None:
        self._floats("gate_up", gate_up, 2)
        if gate_up.shape[1] % 2:
            _refuse("gate_up", gate_up, "of even width: gate, then up")

    def _vector(self, name: str, tensor: torch.Tensor, length: int, dtype: torch.dtype) -> None:
        if (
            not self._is_here(tensor)
            or tensor.dtype is not dtype
            or tensor.shape != (length,)
            or not tensor.is_contiguous()
        ):
            _refuse(name, tensor, f"a dense {dtype} [{length}] on {self.device}")

    def _logits(self, logits: torch.Tensor) -> None:
        self._floats("logits", logits, 2)
        if logits.dtype != torch.float32 or logits.shape[1] == 0:
            _refuse("logits", logits, "float32 [R, V], V at least 1")

    def _pages(self, pages: KVPages, activations: torch.dtype) -> torch.Size:
        """The shape of keys and values: `[num_pages, HKV, page_size, D]`."""
        keys, values = pages.keys, pages.values
        dtype, shape, stride = keys.dtype, keys.shape, keys.stride()
        if (
            not self._is_here(keys)
            or (dtype is not activations and dtype not in self.page_dtypes)
            or len(shape) != 4
            or 0 in shape[1:]
            or stride[1:] != (shape[2] * shape[3], shape[3], 1)
            or shape[3] % 8
        ):
            names = ", ".join(str(each) for each in (activations, *self.page_dtypes))
            _refuse(
                "pages.keys",
                keys,
                f"[num_pages, HKV, page_size, D] of {names} on {self.device}, dense but for dim 0,"
                " none of HKV, page_size and D 0, D a multiple of 8",
            )
        if (
            not self._is_here(values)
            or values.dtype is not dtype
            or values.shape != shape
            or values.stride()[1:] != stride[1:]
        ):
            _refuse("pages.values", values, f"like pages.keys, {_shown(keys)}")
        self._scales("pages.key_scales", pages.key_scales, keys)
        self._scales("pages.value_scales", pages.value_scales, keys)
        if (
            pages.key_scales is not None
            and pages.value_scales is not None
            and pages.value_scales.stride() != pages.key_scales.stride()
        ):
            _refuse("pages.value_scales", pages.value_scales, "strides of pages.key_scales")
        return shape

    def _scales(self, name: str, scales: torch.Tensor | None, entries: torch.Tensor) -> None:
        if scales is None:
            if entries.dtype in QUANTISED:
                raise ShapeError(f"{name} is missing: pages of {entries.dtype} have scales")
            return
        if entries.dtype not in QUANTISED:
            _refuse(name, scales, f"none: pages of {entries.dtype} have no scales")
        shape = entries.shape[:3]
        if (
            not self._is_here(scales)
            or scales.dtype is not torch.float32
            or scales.shape != shape
            or scales.stride()[1:] != (shape[2], 1)
        ):
            _refuse(name, scales, f"float32 {list(shape)} on {self.device}, dense but for dim 0")


def _kind(weight: Linear) -> str:
    """What all experts of a mixture have in common."""
    dtype = str(weight.dtype).removeprefix("torch.")
    kept = f"int8 for {dtype}" if weight.is_int8 else dtype
    bias = "no bias" if weight.bias is None else "a bias"
    return f"{kept} [{weight.out_features}, {weight.in_features}] with {bias}"


def _shown(tensor: torch.Tensor) -> str:
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        f" stride {list(tensor.stride())} on {tensor.device}"
    )


def _refuse(name: str, tensor: torch.Tensor, wanted: str) -> NoReturn:
    raise ShapeError(f"{name} is {_shown(tensor)}; wanted: {wanted}")
