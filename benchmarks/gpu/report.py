"""What the scripts for a card share: the machine and its limits, rows, and tables of them.

Knows no kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from kernels.jit.launch import current_target

Row = dict[str, Any]
FAILED = "FAILED"
"""The column of what went wrong."""
TIME_LIMIT_S = 8 * 60 - 20
"""A script begins nothing after that, to end within eight minutes."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where it runs, and how large the problems may be."""

    device: str
    is_tiny: bool
    copy_gb_s: float = 0.0
    matrix_tflop_s: float = 0.0

    def pick(self, full: Any, tiny: Any) -> Any:
        """The problem for a card, or the one to find mistakes with."""
        return tiny if self.is_tiny else full

    def synchronize(self) -> None:
        """Wait for the card."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time_ms(self, run: Callable[[], object]) -> float:
        """Median of single calls, the caches swept between them."""
        if self.is_tiny:
            begin = time.perf_counter()
            run()
            return (time.perf_counter() - begin) * 1e3
        return float(triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median"))

    def graph_ms(self, run: Callable[[], object]) -> float:
        """The same from a CUDA graph: without the host's part."""
        if self.is_tiny:
            return self.time_ms(run)
        return float(triton.testing.do_bench_cudagraph(run, rep=40, return_mode="median"))

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers in bfloat16."""
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)


def measure_limits(machine: Machine) -> tuple[Machine, list[Row]]:
    """What every rate is compared with: a large copy, and a large square product."""
    size = machine.pick(1 << 31, 1 << 16)
    source = torch.empty(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copy_ms = min(machine.time_ms(lambda: target.copy_(source)) for _ in range(3))
    side = machine.pick(8192, 64)
    a, b = machine.random(side, side), machine.random(side, side)
    matrix_ms = min(machine.time_ms(lambda: a @ b) for _ in range(3))
    measured = dataclasses.replace(
        machine,
        copy_gb_s=2 * size / copy_ms / 1e6,
        matrix_tflop_s=2 * side**3 / matrix_ms / 1e9,
    )
    return measured, [
        {"copy GB/s": measured.copy_gb_s, "bf16 matrix TFLOP/s": measured.matrix_tflop_s}
    ]


def attempt(labels: Row, measure: Callable[[], Row]) -> Row:
    """A row of its own, so that the others still count where this one fails.

    A choice of tiles that the card has no room for is an answer, not a failure.
    """
    try:
        return {**labels, **measure()}
    except OutOfResources as error:
        return {**labels, "no room": str(error)[:60]}
    except Exception as error:  # noqa: BLE001  (the row says which, and the exit status)
        return {**labels, FAILED: f"{type(error).__name__}: {str(error)[:300]}"}


def describe_machine(machine: Machine) -> Row:
    """Card, driver and versions."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if machine.device != "cuda":
        return {"card": "none (interpreter)", **versions}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
        driver = found.splitlines()[0].split(",")[-1].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        driver = "unknown"
    return {
        "card": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda or torch.version.hip,
        "target": current_target().arch,
        **versions,
    }


def print_table(title: str, rows: list[Row]) -> None:
    """Rows may have different columns."""
    print(f"\n== {title}")
    if not rows:
        print("(nothing to measure here)")
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [
            f"{value:.4g}" if isinstance(value, float) else str(value)
            for value in (row.get(column, "") for column in columns)
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, *cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


def parser_for(description: str | None, out: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="where the JSON goes")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes on a CPU, to find mistakes"
    )
    return parser


def begin(*, is_tiny: bool) -> tuple[Machine, dict[str, list[Row]]]:
    """Seed torch's numbers and measure the machine: its first two tables."""
    torch.manual_seed(0)
    machine = Machine("cpu" if is_tiny else "cuda", is_tiny)
    described = describe_machine(machine)
    machine, limits = measure_limits(machine)
    return machine, {"machine": [described], "limits": limits}


def finish(results: dict[str, list[Row]], out: Path) -> int:
    """Write the JSON; the exit status."""
    out.write_text(json.dumps(results, indent=1))
    print(f"\nwritten to {out}")
    failed = sum(FAILED in row for rows in results.values() for row in rows)
    if failed:
        print(f"{failed} rows FAILED", file=sys.stderr)
    return 1 if failed else 0
