"""Every path that this machine has, and a fresh seed for every test."""

import secrets
import sys
from collections.abc import Iterator

import pytest
import torch

from kernels import KernelUnavailableError, Ops
from kernels.checks import CheckedOps
from kernels.cpu import library
from kernels.cpu.native_ops import NativeOps
from kernels.reference import TorchOps


def _instruction_sets() -> tuple[str, ...]:
    try:
        return library.instruction_sets(library.load())
    except KernelUnavailableError:
        return ()


NATIVE = _instruction_sets()


def make_ops(path: str, threads: int = 2) -> Ops:
    inner = TorchOps("cpu") if path == "torch" else NativeOps(isa=path, threads=threads)
    return CheckedOps(inner, "cpu")


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The tests' own arithmetic is small; other workers want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that torch allocates holds NaN (whole numbers: the largest) until it is written.

    So an element that a kernel leaves out can't hold what another call left there.
    """
    # What else the switch does to torch's own operations, tests of kernels have no use for.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all(), "torch.utils.deterministic.fill_uninitialized_memory"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Printed when a test fails: `torch.manual_seed` of it makes the same numbers."""
    value = secrets.randbits(32)
    sys.stdout.write(f"seed {value}\n")
    torch.manual_seed(value)
    return value


@pytest.fixture(params=["torch", *NATIVE])
def ops(request: pytest.FixtureRequest) -> Ops:
    """All paths, one after the other."""
    return make_ops(request.param)


@pytest.fixture(params=NATIVE or [pytest.param("", marks=pytest.mark.skip("no native library"))])
def isa(request: pytest.FixtureRequest) -> str:
    """All instruction sets of the native path, which promises bits."""
    return request.param


@pytest.fixture(params=[None, *TorchOps.page_dtypes], ids=lambda kept: str(kept or "unquantised"))
def page_dtype(request: pytest.FixtureRequest, ops: Ops) -> torch.dtype | None:
    """What pages hold: the dtype of the activations (None), or each quantised one of a CPU."""
    assert ops.page_dtypes == TorchOps.page_dtypes
    return request.param


@pytest.fixture
def exact_ops(isa: str) -> Ops:
    return make_ops(isa)


@pytest.fixture
def on_threads(isa: str):
    """`on_threads(n)`: the native path on n threads."""
    return lambda threads: make_ops(isa, threads)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
