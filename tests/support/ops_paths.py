"""The kernel paths that compute on this machine's CPU."""

from __future__ import annotations

from kernels import registry


def cpu_paths() -> list[registry.PathName]:
    """`torch`, and `native` where this installation carries it."""
    return [
        status.name
        for status in registry.describe()
        if status.available and status.device in ("cpu", "any")
    ]
