"""Lists of pages between the pool and this process's memory, as `kernels.ops` moves them.

On a CPU the pool is this process's memory: a page comes out in one copy and goes in with one. On a
GPU pages cross in pinned memory; what goes out joins the stream of the steps and nobody waits for
it there, what comes in takes a stream of its own. Knows nothing of levels, keys or orders.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.ops import Ops
from kvpaging.base.ids import PageId
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.transfer import to_device


@dataclass(frozen=True, slots=True)
class PagesOut:
    """Pages on their way out of the pool."""

    payloads: Sequence[memoryview]
    """Each page's span. Nothing may be read before `wait` returned; the memory is theirs."""
    _arrived: torch.cuda.Event | None

    def wait(self) -> None:
        """Until all of them have arrived. From any thread."""
        if self._arrived is not None:
            self._arrived.synchronize()


class PageSwaps:
    """Moves pages of one pool. `take_out` in the steps' thread, `put_in` in any others."""

    def __init__(self, pool: KVPool, ops: Ops) -> None:
        self._pool = pool
        self._ops = ops
        self._stream: torch.cuda.Stream | None = None
        if pool.pages.is_cuda:
            self._stream = torch.cuda.Stream(  # type: ignore[no-untyped-call]
                pool.pages.device
            )
        self._taken_out: torch.cuda.Event | None = None
        self._stream_lock = threading.Lock()

    def take_out(self, page_ids: Sequence[PageId]) -> PagesOut:
        """Copies of these pages as they are once all work ordered so far is done."""
        pages = self._pool.pages
        with torch.inference_mode():
            host = torch.empty(
                (len(page_ids), pages.shape[1]), dtype=torch.uint8, pin_memory=pages.is_cuda
            )
            places = np.arange(len(page_ids), dtype=np.int64)
            self._ops.swap_out(pages, host, self._ids(page_ids), to_device(places, pages.device))
            if self._stream is not None:
                self._taken_out = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._taken_out.record()
        return PagesOut([memoryview(page) for page in host.numpy()], self._taken_out)

    def put_in(self, page_ids: Sequence[PageId], payloads: Sequence[bytes | memoryview]) -> None:
        """Make the payloads, of `spec.page_bytes` bytes each, these pages: they are on return.

        They may have been taken out before, and nothing else is to touch them.
        """
        if self._stream is None:
            pool = self._pool.pages.numpy()
            for page_id, payload in zip(page_ids, payloads, strict=True):
                pool[page_id] = np.frombuffer(payload, np.uint8)
            return
        pages = self._pool.pages
        host = torch.empty((len(payloads), pages.shape[1]), dtype=torch.uint8, pin_memory=True)
        for place, payload in zip(host.numpy(), payloads, strict=True):
            place[:] = np.frombuffer(payload, np.uint8)
        with self._stream_lock, torch.inference_mode(), torch.cuda.stream(self._stream):
            if self._taken_out is not None:
                self._stream.wait_event(self._taken_out)
            places = np.arange(len(payloads), dtype=np.int64)
            self._ops.swap_in(pages, host, self._ids(page_ids), to_device(places, pages.device))
            self._stream.synchronize()

    def _ids(self, page_ids: Sequence[PageId]) -> torch.Tensor:
        return to_device(np.array(page_ids, dtype=np.int64), self._pool.pages.device)
