"""From a plan to tensors: one row of tokens and pages for each sequence, kept from step to step.

A plan carries changes only; the rows hold the rest. Building a step's tensors gathers from them in
a few numpy calls, with no Python per token. What a row came with lies on the host; the token that
was sampled for it last lies on the device, where the next step takes it from: the host may not have
seen it yet. Knows nothing of models and sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvpaging.base.ids import SeqId
from kvpaging.execution.batch import DeviceBatch, LastRows
from kvpaging.execution.growing import GrowingTable
from kvpaging.execution.transfer import to_device
from kvpaging.scheduling.plan import AddedSequence, ScheduledSequence


class BatchBuilder:
    """The rows of all sequences that the runner knows. One row is one small whole number.

    A row computes the tokens that it came with, in pieces, and after them one sampled token a step.
    Tokens and page tables take 4 bytes an entry and grow as the sequences do.
    """

    def __init__(self, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._device = device
        self._tokens = GrowingTable(num_columns=256)
        self._pages = GrowingTable(num_columns=32)
        self._sampled = torch.zeros(16, dtype=torch.int64, device=device)
        """The token that each row sampled last."""
        self._row_of: dict[SeqId, int] = {}
        self._free_rows: list[int] = []

    def row_of(self, seq_id: SeqId) -> int:
        """The sequence's row, from `add` until `remove`."""
        return self._row_of[seq_id]

    def add(self, sequence: AddedSequence) -> int:
        """Give a sequence a row with its tokens and pages; returns the row."""
        row = self._free_rows.pop() if self._free_rows else len(self._row_of)
        self._row_of[sequence.seq_id] = row
        if row >= len(self._sampled):
            self._sampled = torch.cat([self._sampled, torch.zeros_like(self._sampled)])
        self._tokens.replace(row, sequence.token_ids)
        self._pages.replace(row, sequence.page_ids)
        return row

    def remove(self, seq_id: SeqId) -> int:
        """Take the sequence's row away; returns it. It will be given to another."""
        row = self._row_of.pop(seq_id)
        self._free_rows.append(row)
        return row

    def append(self, rows: npt.NDArray[np.int64], token_ids: torch.Tensor) -> None:
        """Append one sampled token to each of several distinct rows: `[R]` int64 on the device."""
        self._sampled.index_copy_(0, self._send(rows), token_ids)

    def tokens(self, seq_id: SeqId, start: int, end: int) -> npt.NDArray[np.int64]:
        """A copy of the tokens from `start` to before `end`, of those that it came with."""
        return self._tokens.cells[self._row_of[seq_id], start:end].astype(np.int64)

    def build(self, scheduled: Sequence[ScheduledSequence]) -> DeviceBatch:
        """Append the step's new pages to their rows and lay its tokens out behind each other.

        Where no prompt token is scored and some token isn't the last of a sequence that samples,
        the batch has `last_rows`: at least one, so that no operation meets an empty tensor.
        """
        count = len(scheduled)
        rows = self._rows(scheduled)
        for entry, row in zip(scheduled, rows.tolist(), strict=True):
            if entry.new_page_ids:
                self._pages.extend(row, entry.new_page_ids)
        starts = np.fromiter((entry.start for entry in scheduled), np.int64, count)
        lengths = np.fromiter((entry.num_new_tokens for entry in scheduled), np.int64, count)
        ends = np.cumsum(lengths)
        query_starts = np.zeros(count + 1, dtype=np.int32)
        query_starts[1:] = ends

        # For each token its sequence's row and its position there.
        row_of_token = np.repeat(rows, lengths)
        shifts = starts - (ends - lengths)
        positions = np.arange(ends[-1], dtype=np.int64) + np.repeat(shifts, lengths)
        page_index, offsets = np.divmod(positions, self._page_size)
        pages = self._pages.cells[row_of_token, page_index].astype(np.int64)
        seq_lens = starts + lengths
        num_pages = -(-int(seq_lens.max()) // self._page_size)
        sampled = np.fromiter((bool(entry.sample_for) for entry in scheduled), np.bool_, count)
        logit_rows = self._send((ends - 1)[sampled])
        last_rows: LastRows | None = None
        is_scored = any(entry.prompt_logprobs is not None for entry in scheduled)
        if not is_scored and np.count_nonzero(sampled) < ends[-1]:
            if not sampled.any():
                sampled[0] = True
            num_last = np.count_nonzero(sampled)
            last_rows = LastRows(
                rows=self._send((ends - 1)[sampled]),
                page_tables=self._send(self._pages.cells[rows[sampled], :num_pages]),
                seq_lens=self._send(seq_lens[sampled].astype(np.int32)),
                query_starts=self._send(np.arange(num_last + 1, dtype=np.int32)),
            )
        return DeviceBatch(
            token_ids=self._token_ids(row_of_token, positions),
            positions=self._send(positions.astype(np.int32)),
            slot_mapping=self._send(pages * self._page_size + offsets),
            page_tables=self._send(self._pages.cells[rows, :num_pages]),
            seq_lens=self._send(seq_lens.astype(np.int32)),
            query_starts=self._send(query_starts),
            logit_rows=logit_rows,
            last_rows=last_rows,
        )

    def _token_ids(
        self, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        """The tokens `[T]` of these rows at these positions."""
        is_sampled = positions >= self._tokens.lengths[rows]
        if is_sampled.all():
            return self._sampled.index_select(0, self._send(rows))
        cells = self._tokens.cells[rows, np.where(is_sampled, 0, positions)]
        token_ids = self._send(cells.astype(np.int64))
        if is_sampled.any():
            which = np.flatnonzero(is_sampled)
            sampled = self._sampled.index_select(0, self._send(rows[which]))
            token_ids.index_copy_(0, self._send(which), sampled)
        return token_ids

    def _rows(self, scheduled: Sequence[ScheduledSequence]) -> npt.NDArray[np.int64]:
        row_of = self._row_of
        return np.fromiter((row_of[entry.seq_id] for entry in scheduled), np.int64, len(scheduled))

    def _send(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self._device)
