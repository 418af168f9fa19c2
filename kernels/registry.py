"""Which path computes: chosen once, by what this machine can do.

Knows the paths and how to ask each whether it can run; nothing about models or requests.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
from typing import Literal, cast

import torch

from kernels.checks import CheckedOps
from kernels.cpu import library
from kernels.cpu.native_ops import NativeOps
from kernels.errors import KernelUnavailableError
from kernels.ops import Ops
from kernels.reference import TorchOps

logger = logging.getLogger(__name__)

PathName = Literal["native", "triton", "torch"]


@dataclasses.dataclass(frozen=True, slots=True)
class PathStatus:
    """One path on this machine, for people (`kvpaging doctor`)."""

    name: PathName
    device: str
    """The device type that it serves."""
    available: bool
    exact: bool
    detail: str
    """What it would run on; or why it can't, and what would help."""
    page_dtypes: tuple[torch.dtype, ...] = ()
    """Of `ops.QUANTISED`: what its pages can hold beside the dtype of activations."""


def select(
    device: torch.device | str,
    *,
    prefer: PathName | None = None,
    threads: int | None = None,
    exact: bool = True,
) -> Ops:
    """Choose the path for `device`: native C++ on a CPU, Triton on CUDA, else plain torch.

    Args:
        device: where the tensors will live.
        prefer: take this path or fail.
        threads: threads of the native path; all that this process may use if not given. torch's
            own thread count is left alone.
        exact: False lets the Triton path trade equal bits for speed; the others have no choice.

    Raises:
        KernelUnavailableError: `prefer` names a path that can't run here, or not on this device.
    """
    device = torch.device(device)
    fast: PathName = "native" if device.type == "cpu" else "triton"
    wanted = prefer or fast
    if wanted == "torch":
        return CheckedOps(TorchOps(device), device)
    try:
        if wanted != fast:
            raise KernelUnavailableError(f"the {wanted} path doesn't serve device {device}")
        inner = _native(threads) if wanted == "native" else _triton(device, exact)
    except KernelUnavailableError as error:
        if prefer is not None:
            raise
        logger.warning("plain torch computes (slower, and not exact): %s", error)
        inner = TorchOps(device)
    return CheckedOps(inner, device)


def describe() -> tuple[PathStatus, ...]:
    """All paths as they stand on this machine. Costs a library load; allocates nothing."""
    return (
        _status("native", "cpu", exact=True),
        _status("triton", "cuda", exact=True),
        PathStatus(
            "torch",
            "any",
            available=True,
            exact=False,
            detail=f"torch {torch.__version__}",
            page_dtypes=TorchOps.page_dtypes,
        ),
    )


def _status(name: PathName, device: str, *, exact: bool) -> PathStatus:
    try:
        detail = library.describe() if name == "native" else _triton_detail()
    except KernelUnavailableError as error:
        return PathStatus(name, device, available=False, exact=exact, detail=str(error))
    page_dtypes = NativeOps.page_dtypes
    if name == "triton":
        page_dtypes = importlib.import_module("kernels.jit").TritonOps("cuda").page_dtypes
    return PathStatus(name, device, True, exact, detail, page_dtypes)


def _native(threads: int | None) -> Ops:
    return NativeOps(threads=threads)


def _triton(device: torch.device, exact: bool) -> Ops:
    _triton_detail()
    jit = importlib.import_module("kernels.jit")
    return cast(Ops, jit.TritonOps(device, exact=exact))


def _triton_detail() -> str:
    if not torch.cuda.is_available():
        raise KernelUnavailableError("torch sees no CUDA device")
    if importlib.util.find_spec("triton") is None:
        raise KernelUnavailableError(
            "the package triton isn't installed: pip install 'kvpaging[gpu]'"
        )
    if importlib.util.find_spec("kernels.jit") is None:
        raise KernelUnavailableError("this build carries no Triton kernels")
    return f"{torch.cuda.get_device_name()}, triton {importlib.import_module('triton').__version__}"
