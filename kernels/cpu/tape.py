"""Work recorded once and played in one call: what CUDA graphs are on a GPU.

A tape holds calls of the native library with their pointers. So while it is recorded every result
comes from an arena, which the tape keeps, and a result that nobody refers to any more makes room
for the next. Torch may only look at the results in other shapes: what it computed would not be
played. Knows nothing of the work.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.ops import Work

_ALIGNMENT = 64


class CannotRecordError(Exception):
    """The work has a part that is not the native library's."""


class Arena:
    """Memory for results, given out again when the last tensor on it is gone."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that holds anything."""
        num_bytes = math.prod(shape) * dtype.itemsize
        block = self._take(num_bytes)
        # The tensor, and every view of it, keeps this view of the block alive.
        area = block[:num_bytes]
        weakref.finalize(area, self._free.append, block)
        return torch.from_numpy(area).view(dtype).view(*shape)

    def _take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        fits = [i for i, block in enumerate(self._free) if len(block) >= num_bytes]
        if fits:
            return self._free.pop(min(fits, key=lambda i: len(self._free[i])))
        # A power of two: so blocks of small batches serve large ones' small results.
        size = 1 << max(num_bytes - 1, _ALIGNMENT - 1).bit_length()
        memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return memory[start : start + size]


class _RefusesToCompute:
    """The rule of `ViewsOnly`, as a base class of its own.

    What a subclass of torch's mode defines itself torch wraps for its compiler, and the first call
    imports all of that: one and a half seconds within the first decode step.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Do `func` if it gives another view of what it was given. Raises `CannotRecordError`."""
        result = func(*args, **(kwargs or {}))
        given = {_memory(arg) for arg in args if isinstance(arg, torch.Tensor)}
        is_view = isinstance(result, torch.Tensor) and _memory(result) in given
        if not is_view or func._schema.is_mutable:
            raise CannotRecordError(str(func))
        return result


class ViewsOnly(_RefusesToCompute, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it torch refuses to compute."""


class Tape:
    """Recorded calls; keeps what they were recorded from, and so all that the pointers lead to."""

    def __init__(self, library: ctypes.CDLL, handle: int, work: Work) -> None:
        self._library = library
        self._handle = handle
        self._work = work
        weakref.finalize(self, library.kv_erase, handle)

    def play(self) -> None:
        """Do all calls in order. Raises `MemoryError`."""
        if self._library.kv_play(self._handle):
            raise MemoryError("a native kernel ran out of memory")


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
