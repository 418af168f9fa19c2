"""Tensor operations of the paged engine: tensors in, tensors out.

`select` chooses a path for a device; all paths mean what `kernels.ops.Ops` says.
Knows nothing of requests, pages as objects, or configuration.
"""

from kernels.errors import KernelError, KernelUnavailableError, ShapeError
from kernels.ops import Linear, Ops
from kernels.registry import PathName, PathStatus, describe, select

__all__ = [
    "KernelError",
    "KernelUnavailableError",
    "Linear",
    "Ops",
    "PathName",
    "PathStatus",
    "ShapeError",
    "describe",
    "select",
]
