"""The paged KV-cache engine: policy, execution and the step loop.

`from kvpaging import Engine` gives the engine as a library. The import is lazy, so that processes
that only need messages or policy never load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpaging.engine.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> object:
    if name == "Engine":
        from kvpaging.engine.engine import Engine

        return Engine
    raise AttributeError(f"module 'kvpaging' has no attribute {name!r}")
