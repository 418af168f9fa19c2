"""Decode steps from static buffers, captured once for each size and replayed.

A step in which every sequence computes one token has a shape that only their number and the width
of the page tables decide. The batch is copied into buffers of that shape, and the layers' work on
them is captured when the shape first comes up. Where launches are dear and rows are cheap, sizes
are rounded up a ladder: a row that pads stores nothing (slot -1) and reads one slot of the scratch
page; rows do not depend on each other, so the others' bits stay. Knows no sampling, and not how
work is captured (`kernels.ops.Ops.capture`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from kernels.ops import Work
from kvpaging.execution.batch import DeviceBatch
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.models.layers import CausalLM

Capture = Callable[[Work], Work | None]
"""`kernels.ops.Ops.capture`, or a test's."""

STEP: Final = 16
"""Padded sizes are 1, 2, 4, 8 and the multiples of this."""
MIN_WIDTH: Final = 64
"""Pages; widths are this one doubled."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows a captured step has."""

    size_for: Callable[[int], int]
    """The rows that serve so many sequences."""
    most: int
    """Sequences; larger batches are worth their launches."""
    kept: int
    """Shapes whose captures are kept; one more displaces that whose last use is longest ago."""


def padded_size(num_seqs: int) -> int:
    """The least size of the ladder that holds so many sequences."""
    if num_seqs <= STEP // 2:
        return 1 << (num_seqs - 1).bit_length()
    return -(-num_seqs // STEP) * STEP


PADDED: Final = Sizes(padded_size, most=512, kept=64)
"""For a GPU: a row costs next to nothing, a capture is dear."""
EXACT: Final = Sizes(int, most=64, kept=256)
"""For a CPU: each row costs its products, recording costs next to nothing."""
GRAPH_BYTES: Final = 8 << 20
"""Set aside for what CUDA keeps of one graph beside its tensors. A guess: no card was at hand."""


def padded_width(num_pages: int) -> int:
    """The least width of the ladder that holds page tables of so many pages."""
    return max(MIN_WIDTH, 1 << (num_pages - 1).bit_length())


def kept_bytes(num_seqs: int, num_pages: int, hidden_bytes: int) -> int:
    """The most that captures of `PADDED` sizes keep between steps, but for what they share.

    `num_seqs`: of the largest step; `num_pages`: of the longest sequence; `hidden_bytes`: of one
    row's hidden states. What the captured work computes in is one memory for all of them.
    """
    sizes = {padded_size(count) for count in range(1, min(num_seqs, PADDED.most) + 1)}
    widths = [MIN_WIDTH]
    while widths[-1] < num_pages:
        widths.append(2 * widths[-1])
    shapes = sorted(size * (4 * width + hidden_bytes) for size in sizes for width in widths)
    return sum(num_bytes + GRAPH_BYTES for num_bytes in shapes[-PADDED.kept :])


class StaticBatch:
    """A decode batch of a fixed shape, at fixed addresses."""

    def __init__(self, size: int, width: int, hidden: torch.Tensor) -> None:
        """Room for `size` sequences of `width` pages, all of it padding.

        Hidden states are as wide as `hidden [_, H]`, of its dtype and on its device.
        """
        device = hidden.device
        numbers = torch.arange(size + 1, device=device)
        self.hidden = hidden.new_zeros(size, hidden.shape[1])
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

    def fill(self, hidden: torch.Tensor, batch: DeviceBatch) -> None:
        """Take over a decode batch that fits, its tokens embedded as `hidden [B, H]`.

        The rows after its own become padding.
        """
        count, width = batch.page_tables.shape
        mine = self.batch
        self.hidden[:count] = hidden
        mine.positions[:count] = batch.positions
        mine.slot_mapping[:count] = batch.slot_mapping
        mine.page_tables[:count, :width] = batch.page_tables
        mine.seq_lens[:count] = batch.seq_lens
        if count < self._num_seqs:
            stale = slice(count, self._num_seqs)
            self.hidden[stale] = 0
            mine.positions[stale] = 0
            mine.slot_mapping[stale] = -1
            mine.page_tables[stale] = 0
            mine.seq_lens[stale] = 1
        self._num_seqs = count


class DecodeGraphs:
    """The layers' work of decode steps, captured when a shape first comes up.

    When one can't be captured, no further one is tried: those that are there go on.
    """

    def __init__(self, model: CausalLM, pool: KVPool, capture: Capture, sizes: Sizes) -> None:
        self._model = model
        self._pool = pool
        self._capture: Capture | None = capture
        self._sizes = sizes
        self._captured: dict[tuple[int, int], tuple[StaticBatch, Work]] = {}

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, pages of a table) of what is kept, that of the last step at the end."""
        return tuple(self._captured)

    def fits(self, num_seqs: int) -> bool:
        """Whether a step of so many sequences may run from a capture."""
        may_be = self._capture is not None or bool(self._captured)
        return may_be and num_seqs <= self._sizes.most

    def hidden(self, batch: DeviceBatch) -> torch.Tensor:
        """Hidden states `[B, H]` of a batch of one token a sequence, as `CausalLM.forward`.

        Writes keys and values to the pool. The result is good until the next call; what reads it
        must be ordered before that, as work on one stream is.
        """
        hidden = self._model.embed(batch.token_ids)
        count, width = batch.page_tables.shape
        shape = self._sizes.size_for(count), padded_width(width)
        if shape not in self._captured and not self._add(shape, hidden, batch):
            return self._model.layers(hidden, batch, self._pool)
        static, replay = self._captured[shape] = self._captured.pop(shape)
        static.fill(hidden, batch)
        return replay()[:count]

    def _add(self, shape: tuple[int, int], hidden: torch.Tensor, batch: DeviceBatch) -> bool:
        """Capture a shape, if that can be."""
        if self._capture is None:
            return False
        static = StaticBatch(*shape, hidden)
        static.fill(hidden, batch)
        work = self._capture(lambda: self._model.layers(static.hidden, static.batch, self._pool))
        if work is None:  # a path without, or memory is short: nor could another shape be
            self._capture = None
            return False
        self._captured[shape] = static, work
        # After a capture, which waits for the device: nothing of what goes is still under way.
        while len(self._captured) > self._sizes.kept:
            del self._captured[next(iter(self._captured))]
        return True
