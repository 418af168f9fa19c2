"""What nobody waits for gives way: threads that write do, threads that read and compute do not."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from level_pages import ROOT, key_of, page_of

from kvpaging.base.threads import NICENESS
from kvpaging.levels.disk import DiskLevel

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="threads have priorities on Linux only"
)


def niceness(name: str) -> set[int]:
    """Of all threads of that name."""
    return {
        os.getpriority(os.PRIO_PROCESS, thread.native_id)
        for thread in threading.enumerate()
        if thread.name.startswith(name) and thread.native_id is not None
    }


def test_packing_gives_way_and_reading_does_not(tmp_path: Path) -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    level = DiskLevel(tmp_path / "cache", 1 << 24, root=ROOT, item_bytes=2, compress=True)
    assert level.store([page_of(n) for n in range(4)], 10.0) == 4
    assert None not in level.load([key_of(n) for n in range(4)], 10.0)
    assert niceness("kvpaging-pack") == {max(own, NICENESS)}
    assert niceness("kvpaging-disk") == {own}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
    level.close()
