"""Captured work does again what it did, on the same memory, whatever its inputs hold by then."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ops_paths import cpu_paths

from kernels import registry
from kernels.cpu.tape import Arena

WIDTH = 64


@pytest.fixture
def ops() -> registry.Ops:
    if "native" not in cpu_paths():
        pytest.skip("no native library here")
    return registry.select("cpu", prefer="native", threads=2)


class Work:
    """A chain of operations whose results die as soon as the next is there."""

    def __init__(self, ops: registry.Ops) -> None:
        self.ops = ops
        self.x = torch.randn(5, WIDTH)
        self.residual = torch.zeros(5, WIDTH)
        self.norm = torch.randn(WIDTH)
        self.up = ops.prepare_linear(torch.randn(6 * WIDTH, WIDTH))
        self.down = ops.prepare_linear(torch.randn(WIDTH, 3 * WIDTH), torch.randn(WIDTH))

    def __call__(self) -> torch.Tensor:
        ops, x = self.ops, self.x
        for _ in range(4):
            x = ops.add_rms_norm(x, self.residual, self.norm, 1e-6)
            wide = ops.silu_mul(ops.linear(x.flatten(1), self.up))
            x = ops.linear(wide, self.down)
        return x


def test_captured_work_follows_its_inputs(ops: registry.Ops) -> None:
    work = Work(ops)
    with torch.inference_mode():
        captured = ops.capture(work)
        assert captured is not None
        for seed in range(3):
            torch.manual_seed(seed)
            work.x.normal_()
            work.residual.zero_()
            wanted = work()
            residual = work.residual.clone()
            work.residual.zero_()
            assert torch.equal(captured(), wanted)
            assert torch.equal(work.residual, residual)


def test_recording_does_nothing_yet(ops: registry.Ops) -> None:
    work = Work(ops)
    assert ops.capture(work) is not None
    assert torch.equal(work.residual, torch.zeros(5, WIDTH))


def test_two_tapes_share_memory_and_disturb_nothing(ops: registry.Ops) -> None:
    first, second = Work(ops), Work(ops)
    one, two = ops.capture(first), ops.capture(second)
    assert one is not None
    assert two is not None
    del second
    gc.collect()
    for _ in range(2):
        first.residual.zero_()
        wanted = first()
        first.residual.zero_()
        two()
        assert torch.equal(one(), wanted)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + 1,
        lambda x: x.mul_(2),
        lambda x: x.t().contiguous(),
        lambda x: x[:, 1:].flatten(),
        lambda x: x.clone(),
        lambda x: torch.zeros(3),
    ],
)
def test_what_torch_computes_cannot_be_captured(ops: registry.Ops, compute) -> None:
    work = Work(ops)
    with torch.inference_mode():
        assert ops.capture(lambda: compute(work())) is None
        # Nothing is left behind: this is done, not recorded.
        work.residual.zero_()
        wanted = work()
        assert ops.capture(work) is not None
        work.residual.zero_()
        assert torch.equal(work(), wanted)


def test_work_that_fails_says_so_and_leaves_nothing_behind(ops: registry.Ops) -> None:
    work = Work(ops)

    def fail() -> torch.Tensor:
        work()
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        ops.capture(fail)
    assert bool((work() != 0).any())


def test_the_first_capture_imports_nothing_large() -> None:
    """torch's compiler takes seconds to import, in the midst of the first decode step."""
    script = """
import sys, torch
from kernels import registry
ops = registry.select("cpu", threads=1)
weight = ops.prepare_linear(torch.randn(16, 16))
x = torch.randn(2, 16)
with torch.inference_mode():
    ops.capture(lambda: ops.linear(x.flatten(1), weight))
    assert ops.capture(lambda: x + 1) is None
sys.exit("torch._dynamo" in sys.modules)
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, timeout=280)


def test_other_threads_work_is_done_meanwhile(ops: registry.Ops) -> None:
    """And lies where no tape writes, though the tape has room that nothing refers to any more."""
    work, x = Work(ops), torch.randn(5, WIDTH)
    wanted = ops.linear(x, work.up)
    found: list[torch.Tensor] = []

    def both() -> torch.Tensor:
        work()
        thread = threading.Thread(target=lambda: found.append(ops.linear(x, work.up)))
        thread.start()
        thread.join()
        return work()

    captured = ops.capture(both)
    assert captured is not None
    assert torch.equal(found[0], wanted)
    captured()
    assert torch.equal(found[0], wanted)


@pytest.mark.parametrize("part", ["rows", "log_softmax", "sample"])
def test_what_ends_a_step_cannot_be_captured(ops: registry.Ops, part: str) -> None:
    """Its results are no part of the arena; such work is launched as before."""
    weight = ops.prepare_linear(torch.randn(50, WIDTH))
    logits, ids = torch.randn(3, 50), torch.tensor([1, 49])
    ones, zeros = torch.ones(3), torch.zeros(3, dtype=torch.int32)
    drawn = (ones, zeros, ones, torch.zeros(3), torch.arange(3), zeros, zeros)
    work = {
        "rows": lambda: weight.rows(ids),
        "log_softmax": lambda: ops.log_softmax(logits),
        "sample": lambda: ops.sample(logits, *drawn),
    }[part]
    wanted = work()
    assert ops.capture(work) is None
    assert torch.equal(work(), wanted)


def test_the_arena_gives_memory_out_again_when_the_last_view_is_gone() -> None:
    arena = Arena()
    first = arena.empty((10, 30), torch.bfloat16)
    assert first.shape == (10, 30)
    assert first.dtype == torch.bfloat16
    assert first.data_ptr() % 64 == 0
    place, view = first.data_ptr(), first[2:]
    del first
    second = arena.empty((10, 30), torch.bfloat16)
    assert second.data_ptr() != place
    del view
    assert arena.empty((10, 30), torch.bfloat16).data_ptr() == place
