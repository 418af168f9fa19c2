"""What a kernel runs on, and one launch of it as data.

A launch is a value so that the same code path that runs on a card can be compiled without one: the
tests record launches and compile them for each target. Knows no kernel by name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal

import torch

Backend = Literal["cuda", "hip", "interpreter"]

_SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_87": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_103": 227 << 10,
    "sm_110": 227 << 10,
    "gfx950": 160 << 10,
    "gfx942": 64 << 10,
    "interpreter": 227 << 10,
}
_LEAST_SHARED_BYTES = {"cuda": 99 << 10, "hip": 64 << 10, "interpreter": 227 << 10}


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """The machine that kernels are compiled for."""

    backend: Backend
    arch: str
    """`sm_90`, `gfx942`, ... or `interpreter`."""

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one program may take."""
        return _SHARED_BYTES.get(self.arch, _LEAST_SHARED_BYTES[self.backend])

    @property
    def has_large_tile_instructions(self) -> bool:
        """Whether a tile of 64 rows or more uses other matrix instructions than a smaller one.

        Hopper and later datacentre cards do (`wgmma`, `tcgen05`). Whether both give the same bits
        is not measured, so exact kernels stay on one side of this line.
        """
        return self.arch in ("sm_90", "sm_100", "sm_103", "sm_110")

    @property
    def has_fp8(self) -> bool:
        """Whether it converts e4m3 numbers; those of gfx942 are others, whose bits differ."""
        if self.backend == "cuda":
            return int(self.arch.removeprefix("sm_")) >= 89
        return self.backend == "interpreter"


def current_target() -> Target:
    """What Triton would compile for in this process. Needs a device, or `TRITON_INTERPRET=1`."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Target("interpreter", "interpreter")
    from triton.runtime import driver

    found = driver.active.get_current_target()
    if found.backend == "cuda":
        return Target("cuda", f"sm_{found.arch}")
    return Target("hip", str(found.arch).split(":")[0])


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """How a program is laid over a multiprocessor."""

    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """One kernel, its grid and its arguments. Allocates nothing."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By name, constants included."""
    schedule: Schedule

    def options(self, target: Target) -> dict[str, int | bool]:
        """What Triton would otherwise choose by its version.

        No contraction of products and sums: the compiler would contract the same formula
        differently in two kernels that promise the same bits. Only matrix instructions fuse.
        """
        options: dict[str, int | bool] = {
            "num_warps": self.schedule.num_warps,
            "num_stages": self.schedule.num_stages,
            "enable_fp_fusion": False,
        }
        if target.backend == "hip":
            # One shape of matrix instruction for every tile, so that tiles do not change bits.
            options["matrix_instr_nonkdim"] = 16
        return options


Runner = Callable[[Launch], None]


def runner_for(target: Target, device: torch.device) -> Runner:
    """What runs launches on `device`, in the current stream."""

    def run(launch: Launch) -> None:
        launch.kernel[launch.grid](**launch.arguments, **launch.options(target))

    if target.backend == "interpreter" or device.index is None:
        return run

    def run_there(launch: Launch) -> None:
        with torch.cuda.device(device):
            run(launch)

    return run_there
