"""Sequences that wait, in the order in which they will run."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from kvpaging.scheduling.sequence import Order, SeqState, Sequence


class WaitingQueue:
    """Priority, then first come, first served; a preempted sequence goes before newer ones.

    A sequence that ends while it waits is told by `discard` and skipped when it comes up, so every
    operation costs O(log n), on average.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Order, Sequence]] = []
        self._num_live = 0

    def __len__(self) -> int:
        return self._num_live

    def push(self, sequence: Sequence) -> None:
        """Add a sequence in state WAITING or PREEMPTED."""
        heapq.heappush(self._heap, (sequence.order, sequence))
        self._num_live += 1

    def first(self) -> Sequence | None:
        """The next one to run, left in place."""
        while self._heap and self._heap[0][1].state is SeqState.FINISHED:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """Remove and return `first()`; there is one."""
        self._num_live -= 1
        return heapq.heappop(self._heap)[1]

    def upcoming(self) -> Iterator[Sequence]:
        """All in order, the first one first; O(log n) each. Good until the queue changes."""
        heap = self._heap
        front = [(heap[0][0], 0)] if heap else []
        while front:
            _, place = heapq.heappop(front)
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(heap):
                    heapq.heappush(front, (heap[child][0], child))
            sequence = heap[place][1]
            if sequence.state is not SeqState.FINISHED:
                yield sequence

    def take(self, sequence: Sequence) -> None:
        """Remove one that is here; O(n) unless it is the first."""
        if self._heap[0][1] is sequence:
            self.pop()
            return
        self._num_live -= 1
        self._heap = [entry for entry in self._heap if entry[1] is not sequence]
        heapq.heapify(self._heap)

    def discard(self) -> None:
        """One of the waiting sequences has moved to FINISHED."""
        self._num_live -= 1
        if len(self._heap) > 2 * self._num_live + 64:  # so that the ended ones hold no memory
            self._heap = [e for e in self._heap if e[1].state is not SeqState.FINISHED]
            heapq.heapify(self._heap)
