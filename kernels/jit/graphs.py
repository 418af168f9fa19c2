"""CUDA graphs: work captured once and launched in one call.

Knows nothing of the work, but that it must not wait for the device or look at what it computed.
"""

from __future__ import annotations

import logging

import torch

from kernels.ops import Work

_logger = logging.getLogger(__name__)


class Graphs:
    """Captures on one device. All graphs share one pool of memory: one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._memory = torch.cuda.graph_pool_handle()

    def capture(self, work: Work) -> Work | None:
        """See `kernels.ops.Ops.capture`.

        The work runs once before it is captured: kernels are compiled and workspaces made then.
        `None`, and a warning, where memory was short or CUDA would not capture it: who asked does
        the work itself, and hears of whatever is wrong with the work from that.
        """
        try:
            return self._capture(work)
        except RuntimeError as error:  # torch's out-of-memory error is one
            _logger.warning(
                "work could not be captured on %s and is launched kernel by kernel: %s: %s",
                self._device,
                type(error).__name__,
                str(error).partition("\n")[0],
            )
            return None

    def _capture(self, work: Work) -> Work:
        with torch.cuda.device(self._device):
            beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                work()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            # Other threads move pages meanwhile, and may.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                result = work()

        def replay(
            _held: Work = work,
        ) -> torch.Tensor:  # keeps all that the graph's pointers lead to
            with torch.cuda.device(self._device):
                graph.replay()
            return result

        return replay
