"""What the operations and their registry raise.

KernelError
├ ShapeError          (also a ValueError): a tensor doesn't fit the operation
└ KernelUnavailableError   the wanted path can't run on this machine
"""

from __future__ import annotations


class KernelError(Exception):
    """Base of everything that this package raises on purpose."""


class ShapeError(KernelError, ValueError):
    """A shape, dtype, stride or device doesn't fit the operation. Nothing was changed."""


class KernelUnavailableError(KernelError, RuntimeError):
    """The wanted path can't run here; the message says why and what would help."""
