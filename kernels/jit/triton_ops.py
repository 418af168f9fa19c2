"""`kernels.ops.Ops` by Triton kernels: allocates results and workspaces, then launches.

Knows which kernel computes which operation; the tiles and grids are the kernels' own.
"""
# ruff: noqa: D102  (the operations are documented once, in kernels/ops.py)

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
import triton

from kernels.jit import attention, linear, page_copies, rope, rows, sampling
from kernels.jit.graphs import Graphs
from kernels.jit.launch import Runner, Target, current_target, runner_for
from kernels.ops import Experts, KVPages, Linear, Work
from kernels.quantization import int8_rows, no_int8_rows


@dataclasses.dataclass(frozen=True, slots=True)
class TritonLinear:
    """The weight `[N, K]`, rows dense: as it came, or int8 with a float32 scale for each row."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None
    dtype: torch.dtype
    """That it came in."""

    @property
    def is_int8(self) -> bool:
        return self.scales is not None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        if self.scales is not None:
            raise no_int8_rows()
        return self.weight.index_select(0, ids)


@dataclasses.dataclass(frozen=True, slots=True)
class TritonExperts:
    """The weights of a mixture's experts, held so that the addresses stay theirs."""

    weights: tuple[TritonLinear, ...]
    weight_addresses: torch.Tensor
    """`[experts]` int64, on the device; the other two likewise."""
    bias_addresses: torch.Tensor | None
    scale_addresses: torch.Tensor | None

    @property
    def in_features(self) -> int:
        return self.weights[0].in_features

    @property
    def out_features(self) -> int:
        return self.weights[0].out_features

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype


class TritonOps:
    """`kernels.ops.Ops` on CUDA (or ROCm) tensors.

    With `exact`, a row's bits don't depend on its batch, chunks and pages. Without it, linears are
    the vendor library's, and attention uses the tiles that suit each kernel best.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        exact: bool = True,
        target: Target | None = None,
        runner: Runner | None = None,
    ) -> None:
        """Take a device.

        Args:
            device: where the tensors live.
            exact: see the class.
            target: compile for this instead of the device (tests, together with `runner`).
            runner: takes the launches instead of running them.
        """
        self._target = target or current_target()
        self._device = torch.device(device)
        self._run = runner or runner_for(self._target, self._device)
        self._graphs: Graphs | None = None
        self.exact = exact
        self.page_dtypes: tuple[torch.dtype, ...] = (torch.int8,)
        if self._target.has_fp8:
            self.page_dtypes += (torch.float8_e4m3fn,)
        # A part of the pages' identity: another compiler may give other bits.
        self.name = f"triton {triton.__version__} {self._target.arch}"
        if not exact:
            self.name += " not exact"

    def capture(self, work: Work) -> Work | None:
        if self._device.type != "cuda":
            return None
        if self._graphs is None:
            self._graphs = Graphs(self._device)
        return self._graphs.capture(work)

    def prepare_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> TritonLinear:
        return TritonLinear(weight.contiguous(), bias, None, weight.dtype)

    def prepare_int8_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> TritonLinear:
        whole, scales = int8_rows(weight)
        return TritonLinear(whole, bias, scales, weight.dtype)

    def prepare_experts(self, weights: Sequence[Linear]) -> TritonExperts:
        own = tuple(_own(weight) for weight in weights)
        return TritonExperts(
            own,
            _addresses([each.weight for each in own]),
            None if own[0].bias is None else _addresses([each.bias for each in own]),
            None if own[0].scales is None else _addresses([each.scales for each in own]),
        )

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        own = _own(weight)
        if not self.exact and own.scales is None:
            return F.linear(x, own.weight, own.bias)
        return self._linear(x, own, x.dtype)

    def linear_float32(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        return self._linear(x, _own(weight), torch.float32)

    def _linear(self, x: torch.Tensor, own: TritonLinear, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(x.shape[0], own.out_features, dtype=dtype, device=x.device)
        if out.numel():
            tiles = linear.choose_tiles(
                self._target, x.shape[0], own.out_features, x.dtype, exact=self.exact
            )
            self._run(linear.linear_launch(out, x, own.weight, own.bias, own.scales, tiles))
        return out

    def grouped_linear(
        self, x: torch.Tensor, experts: Experts, expert_of_row: torch.Tensor
    ) -> torch.Tensor:
        if not isinstance(experts, TritonExperts):
            raise TypeError(f"experts prepared by another path: {type(experts).__name__}")
        num_rows, out_features = x.shape[0], experts.out_features
        num_experts = len(experts.weights)
        out = x.new_empty(num_rows, out_features)
        if out.numel():
            ordered, row_order = expert_of_row.sort(stable=True)
            expert_starts = torch.searchsorted(
                ordered, torch.arange(num_experts + 1, device=x.device)
            )
            # As if each expert had its fair share: on average its tiles are that full.
            rows_of_expert = -(-num_rows // num_experts)
            tiles = linear.choose_tiles(
                self._target, rows_of_expert, out_features, x.dtype, exact=self.exact
            )
            self._run(
                linear.grouped_linear_launch(
                    out,
                    x,
                    experts.weight_addresses,
                    experts.bias_addresses,
                    experts.scale_addresses,
                    row_order,
                    expert_starts,
                    tiles,
                )
            )
        return out

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, weight_offset: float = 0.0
    ) -> torch.Tensor:
        return self._rms_norm(x, None, weight, eps, weight_offset)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_offset: float = 0.0,
    ) -> torch.Tensor:
        return self._rms_norm(x, residual, weight, eps, weight_offset)

    def _rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
    ) -> torch.Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if out.numel():
            self._run(rows.rms_norm_launch(out, x, residual, weight, eps, weight_offset))
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        if out.numel():
            self._run(rows.gated_launch(out, gate_up, "silu"))
        return out

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        if out.numel():
            self._run(rows.gated_launch(out, gate_up, "gelu"))
        return out

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
        _, num_kv_heads, _, head_dim = pages.keys.shape
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        query = qkv.new_empty(qkv.shape[0], num_heads, head_dim)
        if query.numel():
            self._run(
                rope.rope_store_launch(
                    query,
                    qkv,
                    positions,
                    cos_sin,
                    pages,
                    slot_mapping,
                    q_norm,
                    k_norm,
                    norm_eps,
                    norm_weight_offset,
                )
            )
        return query

    def store_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: KVPages,
        slot_mapping: torch.Tensor,
    ) -> None:
        if key.numel():
            self._run(rope.store_kv_launch(key, value, pages, slot_mapping))

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
        return self._attend(
            query, pages, page_tables, seq_lens, query_starts, scale, window, soft_cap, sinks, None
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
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        out = self._attend(
            query, pages, page_tables, seq_lens, query_starts, scale, window, soft_cap, sinks, lse
        )
        return out, lse

    def _attend(
        self,
        query: torch.Tensor,
        pages: KVPages,
        page_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_starts: torch.Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        sinks: torch.Tensor | None,
        lse: torch.Tensor | None,
    ) -> torch.Tensor:
        _, num_heads, head_dim = query.shape
        group = num_heads // pages.keys.shape[1]
        call = attention.Attention(
            query,
            pages,
            page_tables,
            seq_lens,
            query_starts,
            scale,
            window,
            soft_cap,
            sinks,
            attention.choose_tiles(
                self._target,
                head_dim,
                group,
                query.dtype,
                exact=self.exact,
                quantised=pages.key_scales is not None,
            ),
            self.exact,
        )
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        parts = (call.part_rows, num_heads, call.max_splits)
        part_acc = torch.empty(*parts, head_dim, dtype=torch.float32, device=query.device)
        part_state = torch.empty(*parts, 2, dtype=torch.float32, device=query.device)
        for launch in call.launches(out, lse, part_acc, part_state):
            self._run(launch)
        return out

    def merge_state(
        self, out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
        if out.numel():
            self._run(attention.merge_states_launch(out, lse, out_a, lse_a, out_b, lse_b))
        return out, lse

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
        out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        if out.numel():
            self._run(
                sampling.sample_launch(
                    out,
                    logits,
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    seeds,
                    output_indices,
                    positions,
                )
            )
        return out

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        if out.numel():
            self._run(rows.log_softmax_launch(out, logits))
        return out

    def copy_pages(self, pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
        if sources.numel():
            self._run(page_copies.copy_pages_launch(pool, sources, pool, targets))

    def swap_out(
        self, pool: torch.Tensor, host: torch.Tensor, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        if pages.numel():
            self._run(page_copies.copy_pages_launch(pool, pages, host, places))

    def swap_in(
        self, pool: torch.Tensor, host: torch.Tensor, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        if pages.numel():
            self._run(page_copies.copy_pages_launch(host, places, pool, pages))


def _addresses(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Where they lie, int64 beside them. None of them is `None`: experts are alike."""
    present = [each for each in tensors if each is not None]
    return torch.tensor([each.data_ptr() for each in present], device=present[0].device)


def _own(weight: Linear) -> TritonLinear:
    if not isinstance(weight, TritonLinear):
        raise TypeError(f"a weight prepared by another path: {type(weight).__name__}")
    return weight
