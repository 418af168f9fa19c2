"""How much memory this process may still take, seen from inside a container or not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_CGROUP: Final = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory that can be had without swapping: the machine's, or the control group's if less."""
    limits = [_machine_bytes()]
    group = _cgroup_bytes(_CGROUP)
    if group is not None:
        limits.append(group)
    return max(0, min(limits))


def _machine_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_bytes(root: Path) -> int | None:
    """What a version 2 control group leaves; `None` where there is no limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((root / "memory.current").read_text())
        for line in (root / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name == "inactive_file":
                used -= int(value)  # cached file contents: given back when asked for
        return int(limit) - used
    except (OSError, ValueError):
        return None
