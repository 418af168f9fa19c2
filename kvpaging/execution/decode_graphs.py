"""Decode steps from static buffers, captured once for each size and replayed.

A step in which every sequence computes one token has a shape that only their number and the width
of the page tables decide. Both are rounded up a ladder, the batch is copied into buffers of that
shape, and the work on them is captured when the shape first comes up. A row that pads stores
nothing (slot -1) and reads one slot of the scratch page; rows do not depend on each other, so the
others' bits stay. Knows no sampling; what captures is given (`cuda_capture`, or a test's).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from kvpaging.execution.batch import DeviceBatch
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.models.layers import CausalLM

Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Takes work on static buffers; what it gives does the same work again when called."""

STEP: Final = 16
"""Sizes are 1, 2, 4, 8 and the multiples of this ..."""
MAX_SIZE: Final = 512
"""... up to this one; larger batches are worth their launches."""
MIN_WIDTH: Final = 64
"""Pages; widths are this one doubled."""


def padded_size(num_seqs: int) -> int:
    """The least size of the ladder that holds so many sequences."""
    if num_seqs <= STEP // 2:
        return 1 << (num_seqs - 1).bit_length()
    return -(-num_seqs // STEP) * STEP


def padded_width(num_pages: int) -> int:
    """The least width of the ladder that holds page tables of so many pages."""
    return max(MIN_WIDTH, 1 << (num_pages - 1).bit_length())


class StaticBatch:
    """A decode batch of a fixed shape, at fixed addresses."""

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        """Room for `size` sequences of `width` pages; all of it padding."""
        numbers = torch.arange(size + 1, device=device)
        self.batch = DeviceBatch(
            token_ids=torch.zeros(size, dtype=torch.int64, device=device),
            positions=torch.zeros(size, dtype=torch.int32, device=device),
            slot_mapping=torch.full((size,), -1, dtype=torch.int64, device=device),
            page_tables=torch.zeros(size, width, dtype=torch.int32, device=device),
            seq_lens=torch.ones(size, dtype=torch.int32, device=device),
            query_starts=numbers.int(),
            logit_rows=numbers[:size].clone(),
        )
        self._num_seqs = 0

    def fill(self, batch: DeviceBatch) -> None:
        """Take over a decode batch that fits; the rows after its own become padding."""
        count, width = batch.page_tables.shape
        mine = self.batch
        mine.token_ids[:count] = batch.token_ids
        mine.positions[:count] = batch.positions
        mine.slot_mapping[:count] = batch.slot_mapping
        mine.page_tables[:count, :width] = batch.page_tables
        mine.seq_lens[:count] = batch.seq_lens
        if count < self._num_seqs:
            stale = slice(count, self._num_seqs)
            mine.token_ids[stale] = 0
            mine.positions[stale] = 0
            mine.slot_mapping[stale] = -1
            mine.page_tables[stale] = 0
            mine.seq_lens[stale] = 1
        self._num_seqs = count


class DecodeGraphs:
    """The forward pass of decode steps, captured when a shape first comes up.

    All shapes leave their logits in one buffer: what reads them must be ordered before the next
    step, as work on one stream is.
    """

    def __init__(self, model: CausalLM, pool: KVPool, capture: Capture) -> None:
        self._model = model
        self._pool = pool
        self._capture = capture
        self._captured: dict[tuple[int, int], tuple[StaticBatch, Work]] = {}
        self._logits: torch.Tensor | None = None

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(sequences, pages of a table) of what was captured, in order."""
        return tuple(self._captured)

    def fits(self, num_seqs: int) -> bool:
        """Whether so many sequences are within the ladder."""
        return num_seqs <= MAX_SIZE

    def logits(self, batch: DeviceBatch) -> torch.Tensor:
        """Logits `[B, V]` float32 of a batch of one token a sequence, all of them wanted.

        Writes keys and values to the pool. The result is good until the next call.
        """
        count, width = batch.page_tables.shape
        shape = padded_size(count), padded_width(width)
        if shape not in self._captured:
            static = StaticBatch(*shape, batch.token_ids.device)
            static.fill(batch)
            self._captured[shape] = static, self._capture(lambda: self._compute(static.batch))
        static, replay = self._captured[shape]
        static.fill(batch)
        replay()
        return self._buffer()[:count]

    def _compute(self, batch: DeviceBatch) -> None:
        logits = self._model.logits(self._model.forward(batch, self._pool))
        self._buffer()[: len(logits)].copy_(logits)

    def _buffer(self) -> torch.Tensor:
        if self._logits is None:
            shape = (MAX_SIZE, self._model.config.vocab_size)
            self._logits = torch.empty(shape, dtype=torch.float32, device=self._pool.pages.device)
        return self._logits


def cuda_capture() -> Capture:
    """Capture as CUDA graphs that share one pool of memory.

    The work runs once before it is captured: kernels are compiled and workspaces made then.
    """
    memory = torch.cuda.graph_pool_handle()

    def capture(work: Work) -> Work:
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            work()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads move pages meanwhile, and may.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return capture
