"""The monotonic clock as a value, so that tests and replays own the time.

Readings of two processes can't be compared: intervals are taken within one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds from an arbitrary start, never going back."""

monotonic: Clock = time.monotonic
