"""The native library: where it is, whether it loads, what it can use of this CPU.

Built by the package's own build as `kernels.cpu._native`, a plain shared library with a C ABI:
no Python and no torch inside, so one build serves all of their versions. Knows no tensors.
"""

from __future__ import annotations

from kernels.errors import KernelUnavailableError


def describe() -> str:
    """What the library runs on here.

    Raises:
        KernelUnavailableError: it isn't built or doesn't load.
    """
    raise KernelUnavailableError("this installation carries no native library")
