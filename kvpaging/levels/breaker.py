"""A circuit breaker: after some failures in a row nobody is asked for a while.

The pause doubles while trials fail, and one trial at a time is let through when it is over.
Knows nothing of what it guards.
"""

from __future__ import annotations

import threading
from typing import Final

from kvpaging.base.clock import Clock

FAILURES: Final = 3
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0


class CircuitBreaker:
    """Closed (all may pass), or open until a time, then half open (one may try)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Someone who asked now would be refused. A question."""
        return self._open_until_s is not None and self._clock() < self._open_until_s

    def allows(self) -> bool:
        """Whether to try. A caller that may must say how it ended."""
        with self._lock:
            if self._open_until_s is None:
                return True
            if self._clock() < self._open_until_s:
                return False
            self._open_until_s = self._clock() + self._pause_s  # the others wait for this trial
            return True

    def succeeded(self) -> None:
        """The medium answered."""
        with self._lock:
            self._failures = 0
            self._pause_s = FIRST_PAUSE_S
            self._open_until_s = None

    def failed(self) -> None:
        """The medium did not answer, or not in time."""
        with self._lock:
            self._failures += 1
            if self._failures < FAILURES:
                return
            self._open_until_s = self._clock() + self._pause_s
            self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
