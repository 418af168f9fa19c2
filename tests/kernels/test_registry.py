"""The choice of a path, and that the fast one is really there."""

import logging
import pathlib
import platform
import shutil
import sys
import threading
import time

import pytest
import torch

import kernels
from kernels import KernelUnavailableError, describe, registry, select
from kernels.cpu import library
from kernels.cpu.native_ops import NativeOps

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64" and HAS_COMPILER),
    reason="a native library is expected on x86-64 Linux where a compiler was at hand",
)
def test_the_installed_native_library_computes_on_a_cpu():
    ops = select("cpu")
    assert ops.name.startswith("native")
    assert ops.exact
    loaded = pathlib.Path(library.load()._name)
    assert loaded.parent == pathlib.Path(kernels.__file__).parent / "cpu"
    # It is the one that computes: a call through it, and the result.
    weight = ops.prepare_linear(torch.eye(8))
    assert torch.equal(ops.linear(torch.arange(8.0)[None], weight)[0], torch.arange(8.0))


def test_torch_can_be_asked_for():
    ops = select("cpu", prefer="torch")
    assert ops.name == "torch cpu"
    assert not ops.exact


def test_a_path_that_cannot_run_here_is_refused_by_name(monkeypatch):
    with pytest.raises(KernelUnavailableError, match="triton"):
        select("cpu", prefer="triton")

    def absent():
        raise KernelUnavailableError("this installation has no native library")

    monkeypatch.setattr(library, "load", absent)
    with pytest.raises(KernelUnavailableError, match="no native library"):
        select("cpu", prefer="native")


def test_without_the_library_torch_serves_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr(library, "_find", lambda: None)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    with caplog.at_level(logging.WARNING, registry.__name__):
        ops = select("cpu")
    assert ops.name == "torch cpu"
    assert len(caplog.records) == 1
    assert "compiler" in caplog.text


def test_describe_names_every_path_and_why_not(monkeypatch):
    paths = {path.name: path for path in describe()}
    assert set(paths) == {"native", "triton", "torch"}
    assert paths["torch"].available
    assert all(path.detail for path in paths.values())
    monkeypatch.setattr(library, "_find", lambda: None)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    native = next(path for path in describe() if path.name == "native")
    assert not native.available
    assert "compiler" in native.detail


def test_a_library_of_another_version_is_refused(monkeypatch):
    path = library._find()
    if path is None:
        pytest.skip("no native library")
    monkeypatch.setattr(library, "VERSION", -1)
    with pytest.raises(KernelUnavailableError, match="build it again"):
        library.open_library(path)


def test_an_instruction_set_that_is_not_here_is_refused(isa):
    with pytest.raises(KernelUnavailableError, match="sse9"):
        NativeOps(isa="sse9")
    assert NativeOps(isa=isa, threads=1).name == f"native {isa}"


def test_threads_may_call_at_the_same_time(on_threads):
    ops = on_threads(2)
    weight = ops.prepare_linear(torch.randn(300, 200))
    inputs = [torch.randn(50, 200) for _ in range(4)]
    expected = [ops.linear(x, weight) for x in inputs]
    right = [False] * 4

    def work(i):
        results = [ops.linear(inputs[i], weight) for _ in range(50)]
        right[i] = all(torch.equal(result, expected[i]) for result in results)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(right)


def test_idle_threads_sleep(isa):
    ops = NativeOps(isa=isa, threads=3)
    weight = ops.prepare_linear(torch.randn(600, 600))
    ops.linear(torch.randn(50, 600), weight)
    used: list[float] = []
    # Other threads of this process may have some work; those that don't sleep always have.
    while len(used) < 50 and min(used, default=1.0) >= 0.03:
        time.sleep(0.05)
        start = time.process_time()
        time.sleep(0.3)
        used.append(time.process_time() - start)
    assert min(used) < 0.03, used


def test_fewer_threads_than_asked_for_are_told(isa, caplog):
    assert NativeOps(isa=isa, threads=3).threads == 3
    assert not caplog.records

    class Short:
        """The library, where the system gives one thread less."""

        def __getattr__(self, name):
            return getattr(library.load(), name)

        def kv_create(self, threads, isa):
            return library.load().kv_create(threads - 1, isa)

    assert NativeOps(isa=isa, threads=3, library=Short()).threads == 2
    assert "gave 2 threads of 3" in caplog.text
