"""A thread's device, and small arrays between host and it, without a wait where there can be none.

On a CPU nothing is copied. On a GPU a copy from ordinary memory would wait for the stream, so
everything goes through pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def use_device(device: torch.device) -> None:
    """Make it the calling thread's: where it records events, pins memory and compiles kernels.

    Each thread has a current GPU of its own, and begins with the first one.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The array on the device. On a CPU it shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Tensors on their way to the host: one wait for all of them."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begin. The tensors may be changed only by later work on the same stream."""
        self._event: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if not self._tensors or self._tensors[0].device.type == "cpu":
            return
        self._tensors = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            for t in tensors
        ]
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors, on the host and complete."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
