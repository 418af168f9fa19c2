"""AMX's linears, with the tiles emulated: their order and their edges, on any CPU.

What the hardware does with an instruction is taken from its manual, not seen.
"""

from __future__ import annotations

import pathlib
import shutil
import sys

import pytest
import torch
from kernel_cases import assert_close, rows_alone
from native_builds import SOURCES, Builder

from kernels.checks import CheckedOps
from kernels.cpu import library
from kernels.cpu.native_ops import NativeOps
from kernels.ops import Ops

BF16 = torch.bfloat16
EMULATION = pathlib.Path(__file__).parent / "emulated_tiles.h"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="its system asks for tiles as Linux does"),
]


def build(directory: pathlib.Path, sources: pathlib.Path = SOURCES) -> pathlib.Path:
    builder = Builder("portable", directory, flags=("-include", str(EMULATION)))
    own = [sources / builder.isa_source, sources / "isa_amx_bf16.cpp", sources / "amx.cpp"]
    return builder.link(own, directory)


def test_linears_by_tiles(seed: int, tmp_path: pathlib.Path) -> None:
    built = library.open_library(build(tmp_path))
    assert library.instruction_sets(built)[0] == "amx_bf16", "the trial failed"
    one, three = (
        CheckedOps(NativeOps(isa="amx_bf16", threads=threads, library=built), "cpu")
        for threads in (1, 3)
    )
    for m, n, k in ((1, 1, 8), (3, 33, 100), (16, 64, 32), (17, 70, 33), (40, 130, 515)):
        check_product(one, m, n, k)
    for k in (40, 129, 256):
        check_rows(one, three, k)
    check_neighbours(one)
    check_groups(one)


def check_product(ops: Ops, m: int, n: int, k: int) -> None:
    weight, bias = (torch.randn(n, k) / k**0.5).to(BF16), torch.randn(n).to(BF16)
    x = torch.randn(m, k).to(BF16)
    expected = x.double() @ weight.double().T + bias.double()
    prepared = ops.prepare_linear(weight, bias)
    out = ops.linear(x, prepared)
    assert_close(out, expected, BF16)
    assert_close(ops.linear_float32(x, prepared), expected, torch.float32)


def check_rows(one: Ops, three: Ops, k: int) -> None:
    weight, x = torch.randn(75, k).to(BF16), torch.randn(70, k).to(BF16)
    rows_alone(one, three, lambda ops: ops.prepare_linear(weight.clone()), x)


def check_neighbours(ops: Ops) -> None:
    """What lies next to a row or a panel adds nothing: NaN spoils its own row or column only."""
    for k in (1, 2, 31, 32, 33, 63, 65):
        x, weight = torch.randn(5, k + 40).to(BF16), torch.randn(48, k).to(BF16)
        expected = x[:, :k].double() @ weight.double().T
        x[:, k:] = torch.nan
        x[2] = torch.nan
        weight[16:32] = torch.nan
        out = ops.linear_float32(x[:, :k], ops.prepare_linear(weight))
        rows, cols = [0, 1, 3, 4], [*range(16), *range(32, 48)]
        assert_close(out[rows][:, cols], expected[rows][:, cols], torch.float32)
        assert out[2].isnan().all()
        assert out[:, 16:32].isnan().all()


def check_groups(ops: Ops) -> None:
    weights = [ops.prepare_linear(torch.randn(33, 48).to(BF16)) for _ in range(3)]
    x, experts = torch.randn(50, 48).to(BF16), torch.randint(0, 3, (50,))
    out = ops.grouped_linear(x, ops.prepare_experts(weights), experts)
    for row, expert in enumerate(experts.tolist()):
        assert torch.equal(out[row], ops.linear(x[row : row + 1], weights[expert])[0])


@pytest.mark.parametrize(
    ("what", "old", "new"),
    [
        ("wrong results", "KV_TILE_DOT(1, 4, 7);", "KV_TILE_DOT(1, 4, 6);"),
        ("the end of the process", "config.palette = 1;", "config.palette = 7;"),
    ],
)
def test_tiles_that_fail_their_trial_are_not_used(
    tmp_path: pathlib.Path, what: str, old: str, new: str
) -> None:
    changed = tmp_path / "cpu"
    shutil.copytree(SOURCES, changed, ignore=shutil.ignore_patterns("*.so", "__*"))
    text = (changed / "tiles.h").read_text()
    assert text.count(old) == 1, what
    (changed / "tiles.h").write_text(text.replace(old, new))
    names = library.instruction_sets(library.open_library(build(tmp_path, changed)))
    assert names == ("portable",)
