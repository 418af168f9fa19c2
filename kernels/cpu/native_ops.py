"""The operations by the native library: shapes and pointers in, one call each.

A row's bits depend on its own inputs alone: see the comments of linear.h and attention.h. Weights
are packed once, into memory of their own. Knows the C signatures, and nothing about how the work is
split.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence

import torch

from kernels import huge_pages
from kernels.cpu import library as native
from kernels.cpu.tape import Arena, CannotRecordError, Tape, ViewsOnly
from kernels.errors import KernelUnavailableError, ShapeError
from kernels.ops import Experts, KVPages, Linear, Work
from kernels.quantization import int8_rows, no_int8_rows

_logger = logging.getLogger(__name__)

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SILU, _GELU = 0, 1
_MAX_HEAD_DIM = 512
_PANEL_COLUMNS = 16
_UNFIT = 2


class _Results(threading.local):
    """Where the results of a thread's work lie; each thread has its own `empty`.

    Only the thread that records may take from the arena: what lies there is overwritten when a tape
    plays.
    """

    def __init__(self) -> None:
        self.empty: Callable[[Sequence[int], torch.dtype], torch.Tensor] = _new


@dataclasses.dataclass(frozen=True, slots=True)
class NativeLinear:
    """The weight in panels (linear.h), with what each call needs of it."""

    packed: torch.Tensor
    scales: torch.Tensor | None
    """Of an int8 weight, as the library wants them: see `_scales`."""
    bias: torch.Tensor | None
    dtype: torch.dtype
    """Of the inputs; of the weight too where it isn't int8."""
    in_features: int
    out_features: int
    pointer: int
    scales_pointer: int | None
    bias_pointer: int | None
    ops: NativeOps

    @property
    def is_int8(self) -> bool:
        return self.scales is not None

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        if self.scales is not None:
            raise no_int8_rows()
        return self.ops.rows_of(self, ids)


@dataclasses.dataclass(frozen=True, slots=True)
class NativeExperts:
    """The weights of a mixture's experts, and where their parts lie."""

    weights: tuple[NativeLinear, ...]
    dtype: torch.dtype
    in_features: int
    out_features: int
    pointers: ctypes.Array[ctypes.c_void_p]
    scales_pointers: ctypes.Array[ctypes.c_void_p]
    bias_pointers: ctypes.Array[ctypes.c_void_p]


class NativeOps:
    """`kernels.ops.Ops` on a CPU, in C++."""

    exact = True
    page_dtypes: tuple[torch.dtype, ...] = (torch.int8,)

    def __init__(
        self,
        *,
        threads: int | None = None,
        isa: str | None = None,
        library: ctypes.CDLL | None = None,
    ) -> None:
        """Start the threads.

        Args:
            threads: the caller's included; all that this process may use if not given.
            isa: the instruction set; the best that this CPU has if not given.
            library: another build than the installed one.

        Raises:
            KernelUnavailableError: there is no library, or it or this CPU lacks `isa`.
        """
        self._library = library or native.load()
        usable = native.instruction_sets(self._library)
        self.isa = isa or usable[0]
        if self.isa not in usable:
            raise KernelUnavailableError(f"no {self.isa} kernels here; there are: {usable}")
        wanted = threads or _usable_cpus()
        self.name = f"native {self.isa}"
        context = self._library.kv_create(wanted, self.isa.encode())
        if context is None:
            raise MemoryError("the native kernels can't start")
        self.threads: int = self._library.kv_threads(context)
        if self.threads < wanted:
            _logger.warning("the system gave %d threads of %d", self.threads, wanted)
        self._context: int = context
        self._arena = Arena()
        self._results = _Results()
        weakref.finalize(self, self._library.kv_destroy, context)
        # Looked up once: attribute access on a CDLL is slow the first time only, but not free.
        self._linear = self._library.kv_linear
        self._norm = self._library.kv_norm
        self._gated_rows = self._library.kv_gated
        self._rope_store = self._library.kv_rope_store
        self._attention = self._library.kv_paged_attention

    def capture(self, work: Work) -> Work | None:
        library = self._library
        handle = library.kv_record(self._context)
        if handle is None:
            raise MemoryError("no memory for a tape")
        tape = Tape(library, handle, work)
        self._results.empty = self._arena.empty
        try:
            with ViewsOnly():  # type: ignore[no-untyped-call]
                result = work()
        except CannotRecordError:
            return None
        finally:
            self._results.empty = _new
            library.kv_recorded()

        def play() -> torch.Tensor:
            tape.play()
            return result

        return play

    def prepare_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> NativeLinear:
        return self._packed(weight, None, bias, weight.dtype)

    def prepare_int8_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> NativeLinear:
        whole, scales = int8_rows(weight)
        return self._packed(whole, _scales(whole, scales), bias, weight.dtype)

    def _packed(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> NativeLinear:
        weight = weight.contiguous()
        out_features, in_features = weight.shape
        row_bytes = in_features * weight.itemsize
        packed = huge_pages.untouched(self._library.kv_packed_bytes(out_features, row_bytes))
        _check(
            self._library.kv_pack_weight(
                self._context, weight.data_ptr(), out_features, row_bytes, packed.data_ptr()
            )
        )
        return NativeLinear(
            packed,
            scales,
            bias,
            dtype,
            in_features=in_features,
            out_features=out_features,
            pointer=packed.data_ptr(),
            scales_pointer=None if scales is None else scales.data_ptr(),
            bias_pointer=None if bias is None else bias.data_ptr(),
            ops=self,
        )

    def prepare_experts(self, weights: Sequence[Linear]) -> NativeExperts:
        own = tuple(_own(weight) for weight in weights)
        array = ctypes.c_void_p * len(own)
        return NativeExperts(
            own,
            own[0].dtype,
            own[0].in_features,
            own[0].out_features,
            array(*[each.pointer for each in own]),
            array(*[each.scales_pointer for each in own]),
            array(*[each.bias_pointer for each in own]),
        )

    def rows_of(self, weight: NativeLinear, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (int64) of a weight that isn't int8. Raises `IndexError`."""
        ids = ids.to(torch.int64).contiguous()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < weight.out_features:
            raise IndexError(f"a row outside 0 to {weight.out_features - 1}")
        out = torch.empty(len(ids), weight.in_features, dtype=weight.dtype)
        _check(
            self._library.kv_unpack_rows(
                self._context,
                weight.pointer,
                weight.in_features * weight.dtype.itemsize,
                ids.data_ptr(),
                len(ids),
                out.data_ptr(),
            )
        )
        return out

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        return self._run_linear(x, weight, x.dtype)

    def linear_float32(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        return self._run_linear(x, weight, torch.float32)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, weight_offset: float = 0.0
    ) -> torch.Tensor:
        rows, width = x.shape
        out = self._results.empty((rows, width), x.dtype)
        _check(
            self._norm(
                self._context,
                _CODES[x.dtype],
                x.data_ptr(),
                x.stride(0),
                None,
                0,
                rows,
                width,
                weight.data_ptr(),
                _CODES[weight.dtype],
                weight_offset,
                eps,
                out.data_ptr(),
            )
        )
        return out

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_offset: float = 0.0,
    ) -> torch.Tensor:
        rows, width = x.shape
        out = self._results.empty((rows, width), x.dtype)
        _check(
            self._norm(
                self._context,
                _CODES[x.dtype],
                x.data_ptr(),
                x.stride(0),
                residual.data_ptr(),
                residual.stride(0),
                rows,
                width,
                weight.data_ptr(),
                _CODES[weight.dtype],
                weight_offset,
                eps,
                out.data_ptr(),
            )
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gated(gate_up, _SILU)

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gated(gate_up, _GELU)

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
        _check_head_dim(head_dim)
        tokens, width = qkv.shape
        num_heads = width // head_dim - 2 * num_kv_heads
        out = self._results.empty((tokens, num_heads, head_dim), qkv.dtype)
        _check(
            self._rope_store(
                self._context,
                _CODES[qkv.dtype],
                qkv.data_ptr(),
                qkv.stride(0),
                tokens,
                positions.data_ptr(),
                cos_sin.data_ptr(),
                cos_sin.shape[1],
                pages.keys.data_ptr(),
                pages.keys.stride(0),
                pages.values.data_ptr(),
                pages.values.stride(0),
                *_page_scales(pages),
                page_size,
                slot_mapping.data_ptr(),
                None if q_norm is None else q_norm.data_ptr(),
                0 if q_norm is None else _CODES[q_norm.dtype],
                None if k_norm is None else k_norm.data_ptr(),
                0 if k_norm is None else _CODES[k_norm.dtype],
                norm_eps,
                norm_weight_offset,
                num_heads,
                num_kv_heads,
                head_dim,
                out.data_ptr(),
            )
        )
        return out

    def store_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: KVPages,
        slot_mapping: torch.Tensor,
    ) -> None:
        _, num_kv_heads, page_size, head_dim = pages.keys.shape
        _check_head_dim(head_dim)
        _check(
            self._library.kv_store_kv(
                self._context,
                _CODES[key.dtype],
                key.data_ptr(),
                key.stride(0),
                value.data_ptr(),
                value.stride(0),
                key.shape[0],
                pages.keys.data_ptr(),
                pages.keys.stride(0),
                pages.values.data_ptr(),
                pages.values.stride(0),
                *_page_scales(pages),
                page_size,
                slot_mapping.data_ptr(),
                num_kv_heads,
                head_dim,
            )
        )

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
        lse = self._results.empty(query.shape[:2], torch.float32)
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
        _, num_kv_heads, page_size, head_dim = pages.keys.shape
        _check_head_dim(head_dim)
        tokens, num_heads, _ = query.shape
        out = self._results.empty((tokens, num_heads, head_dim), query.dtype)
        _check(
            self._attention(
                self._context,
                _CODES[query.dtype],
                query.data_ptr(),
                query.stride(0),
                pages.keys.data_ptr(),
                pages.keys.stride(0),
                pages.values.data_ptr(),
                pages.values.stride(0),
                *_page_scales(pages),
                page_tables.data_ptr(),
                page_tables.stride(0),
                seq_lens.data_ptr(),
                query_starts.data_ptr(),
                page_tables.shape[0],
                num_heads,
                num_kv_heads,
                head_dim,
                page_size,
                scale,
                window or 0,
                soft_cap or 0.0,
                None if sinks is None else sinks.data_ptr(),
                out.data_ptr(),
                None if lse is None else lse.data_ptr(),
            )
        )
        return out

    def merge_state(
        self, out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = self._results.empty(out_a.shape, out_a.dtype)
        lse = self._results.empty(lse_a.shape, torch.float32)
        _check(
            self._library.kv_merge_states(
                self._context,
                _CODES[out_a.dtype],
                out_a.data_ptr(),
                lse_a.data_ptr(),
                out_b.data_ptr(),
                lse_b.data_ptr(),
                lse_a.numel(),
                out_a.shape[2],
                out.data_ptr(),
                lse.data_ptr(),
            )
        )
        return out, lse

    def grouped_linear(
        self, x: torch.Tensor, experts: Experts, expert_of_row: torch.Tensor
    ) -> torch.Tensor:
        if not isinstance(experts, NativeExperts):
            raise TypeError(f"experts prepared by another path: {type(experts).__name__}")
        out = torch.empty(x.shape[0], experts.out_features, dtype=x.dtype)
        num_experts = len(experts.weights)
        _check(
            self._library.kv_grouped_linear(
                self._context,
                _CODES[x.dtype],
                x.data_ptr(),
                x.stride(0),
                x.shape[0],
                expert_of_row.data_ptr(),
                experts.pointers,
                experts.scales_pointers,
                experts.bias_pointers,
                num_experts,
                experts.out_features,
                experts.in_features,
                out.data_ptr(),
            ),
            f"expert_of_row holds numbers that are not in 0 to {num_experts - 1}",
        )
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
        rows, width = logits.shape
        out = torch.empty(rows, dtype=torch.int64)
        _check(
            self._library.kv_sample(
                self._context,
                logits.data_ptr(),
                logits.stride(0),
                rows,
                width,
                temperature.data_ptr(),
                top_k.data_ptr(),
                top_p.data_ptr(),
                min_p.data_ptr(),
                seeds.data_ptr(),
                output_indices.data_ptr(),
                positions.data_ptr(),
                out.data_ptr(),
            )
        )
        return out

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        rows, width = logits.shape
        out = torch.empty(rows, width)
        _check(
            self._library.kv_log_softmax(
                self._context, logits.data_ptr(), logits.stride(0), rows, width, out.data_ptr()
            )
        )
        return out

    def copy_pages(self, pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
        self._copy_pages(pool, sources, pool, targets)

    def swap_out(
        self, pool: torch.Tensor, host: torch.Tensor, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        self._copy_pages(pool, pages, host, places)

    def swap_in(
        self, pool: torch.Tensor, host: torch.Tensor, pages: torch.Tensor, places: torch.Tensor
    ) -> None:
        self._copy_pages(host, places, pool, pages)

    def _copy_pages(
        self, from_: torch.Tensor, sources: torch.Tensor, to: torch.Tensor, targets: torch.Tensor
    ) -> None:
        _check(
            self._library.kv_copy_pages(
                self._context,
                from_.data_ptr(),
                from_.stride(0) * from_.element_size(),
                to.data_ptr(),
                to.stride(0) * to.element_size(),
                to.shape[1:].numel() * to.element_size(),
                sources.data_ptr(),
                targets.data_ptr(),
                sources.shape[0],
            )
        )

    def _run_linear(self, x: torch.Tensor, weight: Linear, dtype: torch.dtype) -> torch.Tensor:
        linear = _own(weight)
        rows = x.shape[0]
        out = self._results.empty((rows, linear.out_features), dtype)
        _check(
            self._linear(
                self._context,
                _CODES[x.dtype],
                x.data_ptr(),
                x.stride(0),
                rows,
                linear.pointer,
                linear.scales_pointer,
                linear.bias_pointer,
                linear.out_features,
                linear.in_features,
                out.data_ptr(),
                dtype == torch.float32,
            )
        )
        return out

    def _gated(self, gate_up: torch.Tensor, gate: int) -> torch.Tensor:
        rows, width = gate_up.shape
        out = self._results.empty((rows, width // 2), gate_up.dtype)
        _check(
            self._gated_rows(
                self._context,
                _CODES[gate_up.dtype],
                gate,
                gate_up.data_ptr(),
                gate_up.stride(0),
                rows,
                width // 2,
                out.data_ptr(),
            )
        )
        return out


def _new(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _scales(whole: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Whole panels of scales, float32, and the bits of as many int32 sums of the rows behind."""
    num_columns = -(-len(scales) // _PANEL_COLUMNS) * _PANEL_COLUMNS
    out = torch.zeros(2, num_columns)
    out[0, : len(scales)] = scales
    out[1].view(torch.int32)[: len(scales)] = whole.sum(dim=1, dtype=torch.int32)
    return out.flatten()


def _check_head_dim(head_dim: int) -> None:
    if head_dim > _MAX_HEAD_DIM:
        raise ShapeError(f"head size {head_dim}; native attention goes to {_MAX_HEAD_DIM}")


def _page_scales(pages: KVPages) -> tuple[int | None, int | None, int]:
    """Pointers to the scales of keys and values, and their stride from page to page."""
    if pages.key_scales is None or pages.value_scales is None:
        return None, None, 0
    return pages.key_scales.data_ptr(), pages.value_scales.data_ptr(), pages.key_scales.stride(0)


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _own(weight: Linear) -> NativeLinear:
    if not isinstance(weight, NativeLinear):
        raise TypeError(f"a weight prepared by another path: {type(weight).__name__}")
    return weight


def _check(failed: int, unfit: str = "an input is out of range") -> None:
    """Raise what a call of the library says: 1, no memory; 2, an input that it can't take."""
    if failed == _UNFIT:
        raise ShapeError(unfit)
    if failed:
        raise MemoryError("a native kernel ran out of memory")
