"""What leaves one level on its way to the next one, by a thread of its own.

Whoever evicts never waits for it: pages that it holds are bounded in bytes, what is beyond that is
not kept, and a segment that is about to go is read as fast as the level below takes it. Knows
nothing of why pages leave or of what the levels are.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from kvpaging.base.clock import Clock, monotonic
from kvpaging.base.threads import give_way
from kvpaging.levels.level import Complaints, Level, StoredPage

MAX_BYTES: Final = 64 << 20
"""Of pages that have left and are not yet stored."""
DEADLINE_S: Final = 10.0
"""For one batch; also for whoever waits until nothing is on its way."""

Batches = Iterable[Sequence[StoredPage]]


class _Work:
    __slots__ = ("batches", "is_dropped", "num_bytes")

    def __init__(self, batches: Batches, num_bytes: int) -> None:
        self.batches: Iterator[Sequence[StoredPage]] = iter(batches)
        self.num_bytes = num_bytes
        self.is_dropped = False


class Overflow:
    """The way from one level down to `below`. Owns a thread; safe to call from several."""

    def __init__(
        self, below: Level, *, max_bytes: int = MAX_BYTES, clock: Clock = monotonic
    ) -> None:
        self.below = below
        self.num_bytes = 0
        """Held until they are stored."""
        self.num_dropped_pages = 0
        """That left and were not passed on, because the level below was too slow."""
        self._max_bytes = max_bytes
        self._complaints = Complaints(logging.getLogger(__name__), clock)
        self._waiting: deque[_Work] = deque()
        self._running: _Work | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._run, name=f"overflow to {below.name}", daemon=True
        )
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Nothing is on its way."""
        with self._changed:
            return self._running is None and not self._waiting

    def put(self, pages: Sequence[StoredPage]) -> None:
        """Pass these pages on, from the first on as far as there is room for them."""
        taken: list[StoredPage] = []
        num_bytes = 0
        with self._changed:
            for page in pages:
                if self.num_bytes + num_bytes + len(page.payload) > self._max_bytes:
                    break
                num_bytes += len(page.payload)
                taken.append(page)
            if taken:
                self._add(_Work([taken], num_bytes))
        self.dropped(len(pages) - len(taken))

    def pull(self, batches: Batches) -> None:
        """Pass on what `batches` gives; the thread takes a batch when it has stored the last."""
        with self._changed:
            self._add(_Work(batches, 0))

    def dropped(self, num_pages: int) -> None:
        """So many pages left and were not passed on."""
        if num_pages:
            with self._changed:
                self.num_dropped_pages += num_pages
            self._complaints.warn("pages are not kept", f"{self.below.name} is too slow for them")

    def drop(self) -> None:
        """Pass on nothing of what came so far; what is being stored is stored on return."""
        self._drop_and_wait(lambda work: True)

    def drop_left(self) -> None:
        """As `drop`, of pages that are nowhere else: those of `pull` have not left yet."""
        self._drop_and_wait(lambda work: work.num_bytes > 0)

    def finish(self, timeout_s: float) -> None:
        """Wait at most so long for pages that are nowhere else.

        Those of `pull` are still where they come from.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self.num_bytes, timeout_s)

    def end(self) -> None:
        """What is not stored yet is not kept, the batch under way excepted. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._drop(lambda work: True)
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """`end`, and wait at most so long for the thread: the level below may hold it."""
        self.end()
        self._thread.join(timeout_s)

    def _add(self, work: _Work) -> None:
        if not self._is_closed:
            self._waiting.append(work)
            self.num_bytes += work.num_bytes
            self._changed.notify_all()

    def _drop_and_wait(self, unwanted: Callable[[_Work], bool]) -> None:
        with self._changed:
            self._drop(unwanted)
            running = self._running
            if running is not None and running.is_dropped:
                self._changed.wait_for(lambda: self._running is not running, 2 * DEADLINE_S)

    def _drop(self, unwanted: Callable[[_Work], bool]) -> None:
        self.num_bytes -= sum(work.num_bytes for work in self._waiting if unwanted(work))
        self._waiting = deque(work for work in self._waiting if not unwanted(work))
        if self._running is not None and unwanted(self._running):
            self._running.is_dropped = True

    def _run(self) -> None:
        give_way()
        while (work := self._next()) is not None:
            try:
                for batch in work.batches:
                    if work.is_dropped:
                        break
                    self.below.store(batch, DEADLINE_S)
            except Exception as error:  # noqa: BLE001 - a level's bug must not end the thread
                self._complaints.warn("a level failed", f"{type(error).__name__}: {error}")

    def _next(self) -> _Work | None:
        """The work before is done; wait for more. `None`: closed."""
        with self._changed:
            if self._running is not None:
                self.num_bytes -= self._running.num_bytes
                self._running = None
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closed or self._waiting)
            if self._is_closed:
                return None
            self._running = self._waiting.popleft()
            return self._running
