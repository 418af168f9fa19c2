"""Threads whose work nobody waits for give way to those that compute.

Linux has a priority for each thread; elsewhere there is one for the process, which stays as it is.
Knows nothing of what the threads do.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from typing import Final

NICENESS: Final = 10
"""A thread that computes gets some nine times the time of one that is so nice (Linux, CFS)."""


def give_way() -> None:
    """Lower the calling thread's priority, where the system lets us. It can't be raised again."""
    if sys.platform.startswith("linux"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
