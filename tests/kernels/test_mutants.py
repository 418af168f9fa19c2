"""Kernels that are wrong in one place must fail the checks of the ordinary tests.

Each mutation replaces one piece of source text; one whose text is gone fails, and says so. The C++
is built for one instruction set; the Triton kernels run in the interpreter.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import kernel_cases
import pytest
import torch
from kernel_cases import Heads
from native_builds import Builder

import kernels
from kernels.checks import CheckedOps
from kernels.cpu import library
from kernels.cpu.native_ops import NativeOps
from kernels.errors import KernelUnavailableError
from kernels.ops import Ops

PACKAGE = pathlib.Path(kernels.__file__).parent
INTERPRETED = pathlib.Path(__file__).parent / "jit" / "interpreted"

Built = TypeVar("Built")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in a file of the package; None leaves everything right."""

    name: str
    path: str = ""
    old: str | None = None
    new: str = ""

    def apply(self, root: pathlib.Path) -> None:
        """Change the copy of the package in `root`."""
        if self.old is None:
            return
        file = root / self.path
        text = file.read_text()
        if text.count(self.old) != 1:
            pytest.fail(
                f"mutant {self.name!r}: its text is {text.count(self.old)} times in {self.path}, "
                "not once; write it anew"
            )
        file.write_text(text.replace(self.old, self.new))


RIGHT = Mutant("right")
BLOCK, FEW, MANY = (f"cpu/attention_{part}.h" for part in ("block", "few", "many"))
CUT = "cpu/cut_attention.cpp"
NATIVE = [
    Mutant(
        "dropped tail mask",
        BLOCK,
        "s = where_less(lanes, set1(static_cast<float>(keys.end - i)), s, set1(-kInfinity));",
        "",
    ),
    Mutant(
        "swapped pages of keys",
        BLOCK,
        "table[page] * task.key_page_stride + head;",
        "table[page ^ 1] * task.key_page_stride + head;",
    ),
    Mutant(
        "swapped pages of values",
        BLOCK,
        "table[page] * task.value_page_stride + head;",
        "table[page ^ 1] * task.value_page_stride + head;",
    ),
    Mutant("causal: not itself", BLOCK, "{first, position + 1}", "{first, position}"),
    Mutant("causal: the next one too", BLOCK, "{first, position + 1}", "{first, position + 2}"),
    Mutant("window one too wide", BLOCK, "task.window + 1) : 0", "task.window) : 0"),
    Mutant("missing scale", BLOCK, "load(scores + i) * scale;", "load(scores + i);"),
    Mutant(
        "splits merged unweighted",
        BLOCK,
        "load(into_values + i) * set1(a);",
        "load(into_values + i);",
    ),
    Mutant(
        "missing scales of int8 keys",
        BLOCK,
        "if constexpr (SCALED) s = s * load(key_scales + i);",
        "",
    ),
    Mutant(
        "missing scales of int8 values",
        BLOCK,
        "Vec scaled = p * load(value_scales + i);",
        "Vec scaled = p;",
    ),
    Mutant(
        "a head's last element is left out",
        BLOCK,
        "sizeof(T) * static_cast<size_t>(task.head_dim - i));\n        }\n    }\n}",
        "sizeof(T) * static_cast<size_t>(task.head_dim - i - 1));\n        }\n    }\n}",
    ),
]
CUTS = [
    Mutant(
        "a split shared by its first page",
        CUT,
        "ceil_div((split + 1) * kSplit, task.page_size);",
        "first_page + 1;",
    ),
    Mutant(
        "a shared split computed for the first of its sequences only",
        CUT,
        "static_cast<size_t>(seqs_.query_starts[b])",
        "static_cast<size_t>(seqs_.query_starts[shared.seqs.front()])",
    ),
    Mutant(
        "shared splits left out",
        CUT,
        "for (const SharedSplit& each : shared) cut_shared(each);",
        "",
    ),
]
SHARED_KEYS = "all = {(all.begin + kKeys - 1) / kKeys * kKeys, all.end / kKeys * kKeys};"
PAIRS = [
    Mutant(
        "a pair of keys that not all rows see",
        FEW,
        SHARED_KEYS,
        "all = {all.begin / kKeys * kKeys, (all.end + kKeys - 1) / kKeys * kKeys};",
    ),
    Mutant("a pair of keys torn apart", FEW, SHARED_KEYS, "all = {all.begin, all.end};"),
    Mutant(
        "many rows: a pair of keys that not all rows see",
        MANY,
        "pairs[r] = {(visible[r].begin + 1) / 2, visible[r].end / 2};",
        "pairs[r] = {visible[r].begin / 2, (visible[r].end + 1) / 2};",
    ),
    Mutant(
        "many rows: the neighbour of the last key",
        MANY,
        "turned.add_key(keys.end - 1,",
        "turned.add_key(keys.end,",
    ),
    Mutant(
        "many rows: the last 32 elements over those before them",
        "cpu/turned.h",
        "+ unit % 2 * 32;",
        "+ 32;",
    ),
    Mutant("many rows: no first key", MANY, "if (keys.begin % 2) turned", "if (false) turned"),
    Mutant("many rows: no last key", MANY, "if (keys.end % 2) turned", "if (false) turned"),
    Mutant(
        "many rows: keys that one row sees alone",
        MANY,
        "alone(r, {together.end, pairs[r].end});",
        "alone(r, {pairs[r].end, pairs[r].end});",
    ),
]
"""Of instruction sets that take two keys in one step."""
TRITON_FILE = "jit/attention.py"
TRITON = [
    Mutant(
        "dropped tail mask",
        TRITON_FILE,
        "seen = inside[None, :] & (position[None, :] <= query_position[:, None])",
        "seen = position[None, :] >= 0",
    ),
    Mutant(
        "swapped pages",
        TRITON_FILE,
        "value_at = value_head + (page * value_page_stride",
        "value_at = value_head + ((page ^ 1) * value_page_stride",
    ),
    Mutant(
        "causal off by one",
        TRITON_FILE,
        "(position[None, :] <= query_position[:, None])",
        "(position[None, :] < query_position[:, None])",
    ),
    Mutant(
        "missing scale",
        TRITON_FILE,
        'input_precision="ieee") * scale_log2',
        'input_precision="ieee")',
    ),
    Mutant(
        "splits merged unweighted",
        TRITON_FILE,
        "acc = acc * shrink[:, None] + other_acc * other_shrink[:, None]",
        "acc = acc + other_acc * other_shrink[:, None]",
    ),
]


def in_parallel(work: Callable[[Mutant], Built], mutants: list[Mutant]) -> list[Built]:
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(work, mutants))


def build(builder: Builder, mutant: Mutant, directory: pathlib.Path) -> pathlib.Path:
    root = directory / mutant.name.replace(" ", "-").replace(":", "")
    shutil.copytree(PACKAGE / "cpu", root / "cpu", ignore=shutil.ignore_patterns("*.so", "__*"))
    mutant.apply(root)
    changed = {root / "cpu" / builder.isa_source, root / (mutant.path or CUT)}
    return builder.link([path for path in changed if path.suffix == ".cpp"], root)


def check(one: Ops, three: Ops) -> None:
    """What test_attention.py checks, on a few shapes."""
    for heads, dtype, kept in (
        (Heads(4, 2, 32, page_size=4), torch.float32, None),
        (Heads(4, 1, 64, window=30), torch.bfloat16, None),
        (Heads(4, 2, 40), torch.float32, torch.int8),
    ):
        kernel_cases.check_attention(one, heads, dtype, kept)
    kernel_cases.check_unseen(one, torch.bfloat16, None)
    kernel_cases.check_order_of_pairs(one, torch.bfloat16)
    kernel_cases.check_attention_bits(one, three, Heads(4, 2, 96), torch.bfloat16, None)
    kernel_cases.check_shared_beginnings(one, three, Heads(4, 2, 32), torch.bfloat16, None)


def test_every_native_mutant_is_killed(seed: int, tmp_path: pathlib.Path) -> None:
    try:
        names = library.instruction_sets(library.load())
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    isa = next(name for name in names if name != "amx_bf16")  # its attention is another's
    builder = Builder(isa, tmp_path)
    mutants = [RIGHT, *NATIVE, *CUTS, *(PAIRS if isa == "avx512_bf16" else ())]
    survivors = []
    builds = in_parallel(lambda mutant: build(builder, mutant, tmp_path), mutants)
    for mutant, built in zip(mutants, builds, strict=True):
        variant = library.open_library(built)
        one, three = (
            CheckedOps(NativeOps(isa=isa, threads=threads, library=variant), "cpu")
            for threads in (1, 3)
        )
        random.seed(seed)
        try:
            check(one, three)
        except AssertionError:
            continue
        survivors.append(mutant.name)
    assert survivors == [RIGHT.name]


def test_every_triton_mutant_is_killed(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("triton")

    def result(mutant: Mutant) -> subprocess.CompletedProcess[str]:
        root = tmp_path / mutant.name.replace(" ", "-")
        shutil.copytree(PACKAGE, root / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        mutant.apply(root / "kernels")
        where = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [
                *(sys.executable, "-P", "-m", "pytest", "-n", "0", "-q", "-x"),
                *("-p", "no:cacheprovider", str(INTERPRETED / "case_attention.py")),
                *("-k", "test_against_float64 and (case1 or case7 or case11)"),
            ],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": where},
            capture_output=True,
            text=True,
            timeout=850,
        )

    mutants = [RIGHT, *TRITON]
    for mutant, done in zip(mutants, in_parallel(result, mutants), strict=True):
        assert isinstance(done, subprocess.CompletedProcess)
        if mutant is RIGHT:
            assert done.returncode == 0, done.stdout
        else:
            assert done.returncode == 1, f"{mutant.name} survives: {done.stdout}"
            assert "AssertionError: (AttentionCase(" in done.stdout, done.stdout
