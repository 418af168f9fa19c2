"""Every operation in plain torch, as the text book has it.

The fallback where nothing faster runs, and what the other paths are tested against. Any device,
any of float32, bfloat16, float16; arithmetic in float32. Promises no bits: torch's matrix products
sum in an order that depends on the number of rows and threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)

from kernels.errors import ShapeError
from kernels.ops import QUANTISED, Experts, KVPages, Linear, Work
from kernels.quantization import int8_rows, no_int8_rows
from kernels.reference.philox import uniform

_FLOAT32_ROWS_AT_ONCE = 8192
"""Rows of a weight that `linear_float32` holds in float32 at a time (a whole LM head is large)."""


@dataclasses.dataclass(frozen=True, slots=True)
class TorchLinear:
    """The weight as it came."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    is_int8: ClassVar[bool] = False

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


@dataclasses.dataclass(frozen=True, slots=True)
class TorchInt8Linear:
    """The weight as int8, a scale for each row."""

    whole: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    is_int8: ClassVar[bool] = True

    @property
    def in_features(self) -> int:
        return self.whole.shape[1]

    @property
    def out_features(self) -> int:
        return self.whole.shape[0]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        raise no_int8_rows()


@dataclasses.dataclass(frozen=True, slots=True)
class TorchExperts:
    """The weights of a mixture's experts."""

    weights: tuple[Linear, ...]

    @property
    def in_features(self) -> int:
        return self.weights[0].in_features

    @property
    def out_features(self) -> int:
        return self.weights[0].out_features

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype


class TorchOps:
    """`kernels.ops.Ops` in plain torch."""

    exact = False
    page_dtypes: tuple[torch.dtype, ...] = (torch.int8,)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.name = f"torch {torch.device(device).type}"

    def capture(self, work: Work) -> Work | None:
        # Attention looks at lengths on the host, which no graph can hold.
        return None

    def prepare_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> TorchLinear:
        return TorchLinear(weight, bias)

    def prepare_int8_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> TorchInt8Linear:
        return TorchInt8Linear(*int8_rows(weight), bias, weight.dtype)

    def prepare_experts(self, weights: Sequence[Linear]) -> TorchExperts:
        return TorchExperts(tuple(weights))

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        if isinstance(weight, TorchInt8Linear):
            return self.linear_float32(x, weight).to(x.dtype)
        linear = _own(weight)
        return F.linear(x, linear.weight, linear.bias)

    def linear_float32(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        if isinstance(weight, TorchInt8Linear):
            return _int8_linear(x, weight)
        linear = _own(weight)
        wide = x.float()
        out = torch.cat(
            [wide @ rows.float().T for rows in torch.split(linear.weight, _FLOAT32_ROWS_AT_ONCE)],
            dim=1,
        )
        return out if linear.bias is None else out + linear.bias.float()

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, weight_offset: float = 0.0
    ) -> torch.Tensor:
        return _normalise(x.float(), weight, eps, weight_offset).to(x.dtype)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_offset: float = 0.0,
    ) -> torch.Tensor:
        residual.add_(x)
        return self.rms_norm(residual, weight, eps, weight_offset=weight_offset)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)

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
        _, num_kv_heads, page_size, head_dim = pages.keys.shape
        heads = qkv.reshape(qkv.shape[0], -1, head_dim).float()  # [T, HQ + 2 HKV, D]
        num_heads = heads.shape[1] - 2 * num_kv_heads
        query = heads[:, :num_heads]
        key = heads[:, num_heads : num_heads + num_kv_heads]
        value = heads[:, num_heads + num_kv_heads :]
        if q_norm is not None:
            query = _normalise(query, q_norm, norm_eps, norm_weight_offset)
        if k_norm is not None:
            key = _normalise(key, k_norm, norm_eps, norm_weight_offset)
        cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, rotary / 2]

        stored = slot_mapping >= 0
        slots = slot_mapping[stored]
        places = (slots // page_size, slice(None), slots % page_size)
        _store(_rotate(key, cos, sin)[stored], places, pages.keys, pages.key_scales)
        _store(value[stored], places, pages.values, pages.value_scales)
        return _rotate(query, cos, sin).to(qkv.dtype)

    def store_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: KVPages,
        slot_mapping: torch.Tensor,
    ) -> None:
        stored = slot_mapping >= 0
        slots, page_size = slot_mapping[stored], pages.keys.shape[2]
        places = (slots // page_size, slice(None), slots % page_size)
        _store(key[stored], places, pages.keys, pages.key_scales)
        _store(value[stored], places, pages.values, pages.value_scales)

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
        return self.paged_attention_state(
            query,
            pages,
            page_tables,
            seq_lens,
            query_starts,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
        )[0]

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
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        page_size = pages.keys.shape[2]
        starts = query_starts.tolist()
        for b, seq_len in enumerate(seq_lens.tolist()):
            rows = slice(starts[b], starts[b + 1])
            if rows.start == rows.stop:
                continue
            page_ids = page_tables[b, : -(-seq_len // page_size)].long()
            means, lse[rows] = _attend(
                query[rows].float(),
                _gather(pages.keys, pages.key_scales, page_ids, seq_len),
                _gather(pages.values, pages.value_scales, page_ids, seq_len),
                scale=scale,
                window=window,
                soft_cap=soft_cap,
                sinks=sinks,
            )
            out[rows] = means.to(query.dtype)
        return out, lse

    def merge_state(
        self, out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # torch's exp and log differ by an ulp with the place in the tensor; rounded from float64
        # they don't.
        lse = torch.logaddexp(lse_a.double(), lse_b.double())
        both = torch.zeros_like(out_a, dtype=torch.float32)
        for out, own in ((out_a, lse_a), (out_b, lse_b)):
            share = (own - lse).exp().float().unsqueeze(-1)
            # What has no weight may hold anything: 0 * NaN is NaN.
            both += (out.float() * share).where((own != -torch.inf).unsqueeze(-1), 0.0)
        return both.to(out_a.dtype), lse.float()

    def grouped_linear(
        self, x: torch.Tensor, experts: Experts, expert_of_row: torch.Tensor
    ) -> torch.Tensor:
        if not isinstance(experts, TorchExperts):
            raise TypeError(f"experts prepared by another path: {type(experts).__name__}")
        out = x.new_empty(x.shape[0], experts.out_features)
        for expert in sorted(set(expert_of_row.tolist())):
            if not 0 <= expert < len(experts.weights):
                raise ShapeError(
                    f"expert_of_row holds {expert}; there are {len(experts.weights)} experts"
                )
            rows = (expert_of_row == expert).nonzero().squeeze(1)
            out[rows] = self.linear(x[rows], experts.weights[expert])
        return out

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
        # NaN is never drawn.
        logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        ordered, ids = logits.sort(dim=1, descending=True, stable=True)  # ties: lowest id first
        greedy = ids[:, 0]

        # Relative to the largest; equal logits (infinite ones too) are 0 apart.
        top = ordered[:, :1].double()
        apart = torch.where(ordered == ordered[:, :1], 0.0, ordered.double() - top)
        divisor = torch.where(temperature > 0, temperature, 1.0).double().unsqueeze(1)
        weights = (apart / divisor).exp()

        rank = torch.arange(logits.shape[1], device=logits.device)
        limit = torch.where(top_k > 0, top_k, logits.shape[1]).unsqueeze(1)
        weights = weights.where(rank < limit, 0.0)
        before = weights.cumsum(dim=1) - weights
        nucleus = top_p.double().unsqueeze(1) * weights.sum(dim=1, keepdim=True)
        kept = (before < nucleus) | (top_p >= 1).unsqueeze(1) | (rank == 0)
        kept &= weights >= min_p.double().clamp_max(1.0).unsqueeze(1)
        kept |= rank == 0
        weights = weights.where(kept, 0.0)

        # Inverse CDF over ascending ids.
        cdf = torch.zeros_like(weights).scatter_(1, ids, weights).cumsum(dim=1)
        total = cdf[:, -1:]
        target = uniform(seeds, output_indices, positions).unsqueeze(1) * total
        # The product may round up to the total, which no entry exceeds.
        target = target.minimum(total.nextafter(torch.zeros_like(total)))
        drawn = (cdf <= target).sum(dim=1)
        return torch.where(temperature > 0, drawn, greedy)

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(dim=-1)

    def copy_pages(self, pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
        pool[targets] = pool[sources]

    def swap_out(
        self, pool: torch.Tensor, host: torch.Tensor, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        host[places.cpu()] = pool[pages].cpu()

    def swap_in(
        self, pool: torch.Tensor, host: torch.Tensor, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        pool[pages] = host[places.cpu()].to(pool.device)


def _int8_linear(x: torch.Tensor, linear: TorchInt8Linear) -> torch.Tensor:
    wide = x.float()
    parts = torch.split(linear.whole, _FLOAT32_ROWS_AT_ONCE)
    out = torch.cat([wide @ rows.float().T for rows in parts], dim=1) * linear.scales
    return out if linear.bias is None else out + linear.bias.float()


def _own(weight: Linear) -> TorchLinear:
    if not isinstance(weight, TorchLinear):
        raise TypeError(f"a weight prepared by another path: {type(weight).__name__}")
    return weight


def _normalise(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
) -> torch.Tensor:
    """RMS norm over the last dim of a float32 tensor."""
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return x * scale * (weight_offset + weight.float())


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first `2 * cos.shape[-1]` entries of each head, as two halves."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries `[..., D]` of `dtype` and scales `[...]` float32, as `KVPages` defines them."""
    x = x.float()
    amax = x.abs().amax(dim=-1)
    scale = amax / QUANTISED[dtype]
    is_normal = (scale >= torch.finfo(torch.float32).tiny) & scale.isfinite()
    entries = (x / scale.unsqueeze(-1)).where(is_normal.unsqueeze(-1), 0.0)
    if dtype == torch.int8:
        entries = entries.round()
    return entries.to(dtype), scale.where(is_normal, 0.0).where(amax.isfinite(), torch.nan)


def _store(
    x: torch.Tensor,
    places: tuple[torch.Tensor, slice, torch.Tensor],
    pages: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """Put `x [N, HKV, D]` to its places (page, every head, offset) of one layer's pages."""
    if scales is None:
        pages[places] = x.to(pages.dtype)
    else:
        pages[places], scales[places] = quantise(x, pages.dtype)


def _gather(
    pages: torch.Tensor, scales: torch.Tensor | None, page_ids: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """The first `num_tokens` of a sequence, float32 `[HKV, num_tokens, D]`."""
    taken = pages[page_ids].float()  # [P, HKV, page_size, D]
    if scales is not None:
        taken *= scales[page_ids].unsqueeze(-1)
    return taken.transpose(0, 1).flatten(1, 2)[:, :num_tokens]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, float32: `query [Q, HQ, D]` over `key, value [HKV, N, D]`.

    Returns the means `[Q, HQ, D]` and the logarithms of their weights' sums `[Q, HQ]`.
    """
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads, num_keys, _ = key.shape
    grouped = query.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)  # [HKV, G * Q, D]
    scores = (grouped @ key.mT * scale).view(num_heads, num_queries, num_keys)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)

    key_position = torch.arange(num_keys, device=query.device)
    query_position = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
    visible = key_position <= query_position
    if window is not None:
        visible &= key_position > query_position - window
    scores = scores.masked_fill(~visible, -torch.inf)

    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(-1, num_queries, 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(dim=-1)[..., :num_keys]
    # A key that no query sees may hold anything: 0 * NaN is NaN.
    value = value.masked_fill(~visible.any(dim=0)[:, None], 0.0)
    out = weights.reshape(num_kv_heads, -1, num_keys) @ value
    means = out.view(num_heads, num_queries, head_dim).transpose(0, 1)
    return means, scores.logsumexp(dim=-1).T
