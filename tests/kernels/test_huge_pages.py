"""Memory in huge pages: where it lies, and that the system gives them where it says so."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from kernels.huge_pages import HUGE_PAGE_BYTES, untouched

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 5])
def test_it_is_zeros_and_ours_to_write(num_bytes: int) -> None:
    memory = untouched(num_bytes)
    assert memory.shape == (num_bytes,)
    assert memory.dtype == torch.uint8
    assert not bool(memory.any())
    memory.fill_(7)
    if num_bytes >= HUGE_PAGE_BYTES:
        assert memory.data_ptr() % HUGE_PAGE_BYTES == 0


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no huge pages here"
)
def test_touched_memory_is_in_huge_pages() -> None:
    """Where the system's memory is in pieces, it has none to give: it is asked by itself, too."""
    for _ in range(5):
        memory = untouched(16 * HUGE_PAGE_BYTES)
        memory.fill_(1)
        if _huge_bytes_at(memory.data_ptr()) >= 8 * HUGE_PAGE_BYTES:
            return
    plain = mmap.mmap(-1, 18 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    plain.madvise(mmap.MADV_HUGEPAGE)
    plain.write(b"\1" * (18 * HUGE_PAGE_BYTES))
    area = torch.frombuffer(plain, dtype=torch.uint8)
    given = _huge_bytes_at(area.data_ptr()) // HUGE_PAGE_BYTES
    assert given < 8, "the system gives huge pages, and ours are none"
    pytest.skip(f"the system has {given} huge pages of 16 to give")


def _huge_bytes_at(address: int) -> int:
    """Bytes in huge pages of the mapping that holds `address`."""
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            begin, _, end = name.partition("-")
            is_ours = int(begin, 16) <= address < int(end, 16)
        elif is_ours and name == "AnonHugePages:":
            return int(rest.split()[0]) * 1024
    return 0
