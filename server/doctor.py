"""What this machine can do and what is missing, for `kvpaging doctor`.

Imports torch, which no other module of the API process does. Changes nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

from kernels import registry
from kvpaging.execution.kv_pool import TORCH_DTYPES
from kvpaging.execution.memory import available_bytes

CPU_FEATURES: Final = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)
"""What the native kernels look at, as Linux names it."""
COMPILERS: Final = ("c++", "g++", "clang++")
GIB: Final = 1024**3


def examine() -> list[str]:
    """The findings, one a line, and then one line for each thing that is missing."""
    lines = [f"{name:<9} {finding}" for name, finding in _findings()]
    missing = list(_missing())
    return [*lines, "", *(missing or ["Nothing is missing."])]


def _findings() -> Iterator[tuple[str, str]]:
    yield "kvpaging", f"{version('kvpaging')}, Python {platform.python_version()}"
    yield "system", f"{platform.system()} {platform.release()} on {platform.machine()}"
    yield "torch", f"{torch.__version__}, Triton {_version_of('triton') or 'not installed'}"
    yield "CPU", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores; {_cpu_features()}"
    yield "memory", f"{available_bytes() / GIB:.1f} GiB can be had"
    yield "compiler", _compiler() or "none"
    yield "GPU", "; ".join(_gpus()) or "none that torch sees"
    for path in registry.describe():
        can = "can compute" if path.available else "can't compute"
        exact = "exact" if path.exact else "not exact"
        yield "kernels", f"{path.name} {can} on {path.device}, {exact}: {path.detail}"
        if path.available:
            kept = ", ".join(_name_of(dtype) for dtype in path.page_dtypes)
            yield "", f"{path.name}: weights as they are or int8; KV pages as activations or {kept}"


def _missing() -> Iterator[str]:
    available = {path.name for path in registry.describe() if path.available}
    if "native" not in available:
        yield (
            "Missing: the native kernels; a CPU computes slowly and not exactly without. "
            + (
                "Install again: pip install --force-reinstall --no-deps ."
                if _compiler()
                else "Install a C++ compiler (apt-get install g++), then kvpaging again."
            )
        )
    if torch.cuda.is_available() and "triton" not in available:
        yield "Missing: Triton's kernels for the GPU: pip install 'kvpaging[gpu]'"
    if torch.cuda.is_available() and not (shutil.which("gcc") or shutil.which("clang")):
        yield "Missing: a C compiler, which Triton needs at run time (apt-get install gcc)."
    if not torch.cuda.is_available() and Path("/dev/nvidiactl").exists():
        yield (
            "Missing: a torch that sees the NVIDIA GPU of this machine; this one is "
            f"{torch.__version__}."
        )


def _name_of(dtype: torch.dtype) -> str:
    """As `--kv-cache-dtype` has it."""
    return next(name for name, each in TORCH_DTYPES.items() if each == dtype)


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            has = set(value.split())
            return " ".join(feature for feature in CPU_FEATURES if feature in has)
    return torch.backends.cpu.get_cpu_capability()


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    return None


def _gpus() -> list[str]:
    return [
        f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, "
        f"compute capability {properties.major}.{properties.minor}"
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
