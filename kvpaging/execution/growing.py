"""Arrays of rows that grow on demand, so that no limit has to be paid for before it is reached."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class GrowingTable:
    """`[rows, columns]` of int32, both doubling as needed. Fresh cells are 0.

    Memory is touched only where something was written, and only the written part of a row moves
    when the table grows.
    """

    def __init__(self, num_rows: int = 16, num_columns: int = 64) -> None:
        self.cells: npt.NDArray[np.int32] = np.zeros((num_rows, num_columns), dtype=np.int32)
        self.lengths: npt.NDArray[np.int32] = np.zeros(num_rows, dtype=np.int32)

    def replace(self, row: int, values: npt.ArrayLike) -> None:
        """Make `values` the whole contents of a row."""
        self._reserve(row, 0)
        self.lengths[row] = 0
        self.extend(row, values)

    def extend(self, row: int, values: npt.ArrayLike) -> None:
        """Append to a row."""
        added = np.asarray(values, dtype=np.int32)
        start = int(self.lengths[row])
        stop = start + len(added)
        self._reserve(row, stop)
        self.cells[row, start:stop] = added
        self.lengths[row] = stop

    def row(self, row: int) -> npt.NDArray[np.int32]:
        """The row's contents: a view, good until the table changes."""
        return self.cells[row, : self.lengths[row]]

    def _reserve(self, row: int, num_columns: int) -> None:
        have_rows, have_columns = self.cells.shape
        if row < have_rows and num_columns <= have_columns:
            return
        rows, columns = have_rows, have_columns
        if row >= have_rows:
            rows = max(row + 1, 2 * have_rows)
        if num_columns > have_columns:
            columns = max(num_columns, 2 * have_columns)
        cells = np.zeros((rows, columns), dtype=np.int32)
        for index, length in enumerate(self.lengths):
            cells[index, :length] = self.cells[index, :length]
        lengths = np.zeros(rows, dtype=np.int32)
        lengths[:have_rows] = self.lengths
        self.cells, self.lengths = cells, lengths
