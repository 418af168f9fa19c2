"""The operations, once: signatures, checks, docstrings. `Ops` forwards to the chosen path.

    x, y, ...            activations in float32, bfloat16 or float16
    T                    tokens of the step, all sequences behind each other
    B                    sequences of the step
    HQ, HKV, D           query heads, KV heads, head size
    pages                one layer's keys and values in a page-major pool: `KVPages`
    slot                 page_id * page_size + offset

Every path promises the same meaning; only `exact` paths promise that a row's bits do not depend on
the other rows, on how its queries were chunked, on the pages' places, or on the thread count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch

Work = Callable[[], torch.Tensor]
"""Operations on tensors that stay where they are; gives the last one's result."""

QUANTISED: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What quantised pages may hold, and the largest number of each."""


@dataclasses.dataclass(frozen=True, slots=True)
class KVPages:
    """One layer's keys and values: views of a pool, any stride in dim 0, the rest contiguous.

    Pages hold the dtype of the activations; or a dtype of `QUANTISED`, then each token's key (and
    value) of a head stands for `scale * entry`. With `amax` the largest magnitude of the vector in
    float32 and `most` that of the dtype:

        scale = amax / most; 0 if that is no normal number, NaN if the vector isn't finite
        entry = x / scale, rounded to nearest even; 0 where the scale is 0 or NaN

    So a slot's bits depend on its token alone, and a NaN or an infinity still spoils what sees it.
    """

    keys: torch.Tensor
    """`[num_pages, HKV, page_size, D]`"""
    values: torch.Tensor
    """`[num_pages, HKV, page_size, D]`"""
    key_scales: torch.Tensor | None = None
    """`[num_pages, HKV, page_size]` float32, with quantised pages only."""
    value_scales: torch.Tensor | None = None
    """`[num_pages, HKV, page_size]` float32, with quantised pages only."""


class Linear(Protocol):
    """A weight as one path keeps it: made by `Ops.prepare_linear`, given back to `Ops.linear`."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight as it came, of its bias, and of the inputs that it takes."""

    @property
    def bias(self) -> torch.Tensor | None: ...

    @property
    def is_int8(self) -> bool:
        """Made by `Ops.prepare_int8_linear`."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, `[len(ids), in_features]`: the embedding of a tied LM head.

        Raises `ShapeError` where `is_int8`: embeddings are not quantised.
        """


class Experts(Protocol):
    """The weights of one mixture as one path keeps them: made by `Ops.prepare_experts`."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """See `Linear`."""


class Ops(Protocol):
    """All operations of one path. Inputs and outputs live on the path's device.

    Raises `ShapeError` when a shape, dtype or stride doesn't fit; checks are O(1) and always on.
    """

    name: str
    """For people: `native avx512_bf16`, `torch cpu`, `triton sm_90`, ..."""
    exact: bool
    page_dtypes: tuple[torch.dtype, ...]
    """The dtypes of `QUANTISED` that it can keep pages in."""

    def capture(self, work: Work) -> Work | None:
        """What does the same work again in one launch, on the same memory; `None`: it can't.

        `work` may be done meanwhile, or a part of it, or not. Nothing may be in it but these
        operations, and what a path can capture besides: on a GPU torch's, elsewhere views. What
        the captured work gives is good until captured work of this path is done again.
        """

    def prepare_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """Take a weight `[N, K]` (and bias `[N]`) over; the caller drops its reference.

        May repack, but never keeps two copies.
        """

    def prepare_int8_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """The same, kept as int8 with a float32 scale for each row (`kernels.quantization`).

        Products take x as it is, or its rows as whole numbers of a step each, `max(|x|) / 32767`
        of the row: an output is then off by at most half a step times the sum of its weights'
        magnitudes. Coarser than bfloat16 where one element is some 200 times the others or more.
        Sums and scales are float32 or exact. Raises `ShapeError` where K is above
        `quantization.MAX_INT8_FEATURES`, `ValueError` where the weight isn't finite.
        """

    def prepare_experts(self, weights: Sequence[Linear]) -> Experts:
        """Take one mixture's weights for `grouped_linear`: they are held, not copied.

        All have the same shape and dtype, all or none a bias, all or none are int8.
        """

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        """`x @ weight.T + bias`: `[T, K] -> [T, N]`, dtype of `x`, summed in float32."""

    def linear_float32(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        """The same with a float32 result: the LM head's logits are never rounded."""

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, weight_offset: float = 0.0
    ) -> torch.Tensor:
        """`x / rms(x) * (weight_offset + weight)`, per row of `[T, H]`.

        Computed in float32, rounded once (Zhang and Sennrich 2019; Gemma's offset is 1).
        """

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_offset: float = 0.0,
    ) -> torch.Tensor:
        """`residual += x` in place (rounded to its dtype), then `rms_norm(residual)`."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` of `[T, 2 * I] -> [T, I]`, gate first (Shazeer 2020)."""

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The same with the tanh approximation of GELU (Gemma)."""

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
        """Split, normalise (optional), rotate, store K and V; returns the rotated queries.

        qkv:           [T, (HQ + 2 * HKV) * D], rows may be strided; HKV and D from `pages`
        positions:     [T] int32
        cos_sin:       [max_positions, rotary_dim] float32: cos of the rotary_dim / 2 frequencies,
                       then sin. rotary_dim <= D; the first rotary_dim of a head turn, as two
                       halves (the "neox" layout of all supported families), the rest stays.
        pages:         changed in place at the slots
        slot_mapping:  [T] int64; -1 skips the store of that token. Slots must be distinct.
        q_norm, k_norm: [D] per-head RMS norm before the rotation (Qwen3, Gemma 3)
        returns:       [T, HQ, D]
        """

    def store_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: KVPages,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store K and V as they are (or quantised, where pages are): `rope_store` without rotation.

        key, value:    [T, HKV, D], rows may be strided
        pages:         changed in place at the slots
        slot_mapping:  [T] int64; -1 skips that token. Slots must be distinct.
        """

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
        """Causal attention of each sequence's new queries over all its keys in the pool.

        query:         [T, HQ, D]; sequence b owns rows query_starts[b] .. query_starts[b + 1]
        page_tables:   [B, max_pages] int32; entries past a sequence's last page are never read
        seq_lens:      [B] int32, keys of the sequence, this step's included: its last query sits at
                       position seq_lens[b] - 1
        query_starts:  [B + 1] int32
        window:        a query at position p sees keys p - window + 1 .. p (Mistral's convention)
        soft_cap:      s -> soft_cap * tanh(s / soft_cap) before the mask (Gemma 2)
        sinks:         [HQ] float32: an extra logit per head that takes weight and gives no value
        returns:       [T, HQ, D]; slots outside a sequence, even NaN, never show
        """

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
        """`paged_attention`, and how much weight each row's mean has: what `merge_state` takes.

        returns:       the same [T, HQ, D] bit by bit; [T, HQ] float32, the natural logarithm of the
                       sum of exp(score) over what the row sees, its sink included (so of parts to
                       be merged, one alone is given the sinks)
        """

    def merge_state(
        self, out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the keys of both parts, from each part's result and weight.

        Parts of a row are over different keys: of a prefix that several sequences share, say, each
        of whose queries is a sequence of its own there, and of what follows it (Ye et al. 2024,
        cascade inference). A row's bits depend on its own two parts and their order. They are not
        those of one call over all keys, which rounds once.

        out_a, out_b:  [T, HQ, D], dense, of one dtype
        lse_a, lse_b:  [T, HQ] float32, dense; where one is -inf, the other part is the result as it
                       is; where both are, zeros
        returns:       [T, HQ, D] and [T, HQ], as from `paged_attention_state`
        """

    def grouped_linear(
        self, x: torch.Tensor, experts: Experts, expert_of_row: torch.Tensor
    ) -> torch.Tensor:
        """Row r of `[R, K]` times the weight of expert `expert_of_row[r]` (int64): `[R, N]`.

        The caller repeats rows per chosen expert and sums them in expert order. An expert that
        isn't there raises `ShapeError` on a CPU; on a GPU, where looking would be a wait, the row's
        result is arbitrary.
        """

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
        """Choose one token per row of `[R, V]` float32: `[R]` int64. Penalties were applied before.

        temperature, top_p, min_p: [R] float32; top_k: [R] int32, 0 for all
        seeds: [R] int64 (the bits of an unsigned 64-bit number); output_indices, positions: [R]
        int32. Temperature 0 takes the largest logit, the lowest id on a tie. Else: divide by the
        temperature, keep the top_k largest, of these the smallest set whose probability reaches
        top_p, of these those with at least min_p times the largest probability, and draw by inverse
        CDF over ascending ids with a uniform number from Philox 4x32-10 (Salmon et al. 2011) under
        (seed, output index, position): a row's token depends on nothing but its own inputs.
        Among equal logits the lower id counts as larger; the largest is always kept; NaN is never
        drawn while there is anything else.
        """

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Row-wise `[R, V]` float32, independent of the number of rows and threads."""

    def copy_pages(self, pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """`pool[targets[i]] = pool[sources[i]]` for whole pages `[num_pages, ...]`, int64 `[N]`.

        In place. No target is also a source.
        """

    def swap_out(
        self, pool: torch.Tensor, host: torch.Tensor, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        """`host[places[i]] = pool[pages[i]]`: whole pages, from the device to the host.

        On a GPU this only joins the current stream: `host` holds the pages once that got there.

        pool:    [num_pages, ...] on the device, pages dense
        host:    [num_places, ...] in the host's memory, pinned where the device is a GPU; pages of
                 the same shape and dtype. Changed in place.
        pages, places: [N] int64 on the device; places are distinct
        """

    def swap_in(
        self, pool: torch.Tensor, host: torch.Tensor, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        """`pool[pages[i]] = host[places[i]]`: the way back. Pages are distinct; else as `swap_out`.

        Changes `pool` in place. `host` must stay as it is until the current stream got there.
        """
