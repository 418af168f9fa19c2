"""Builds of the native library for tests: one instruction set, quickly compiled."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
from collections.abc import Iterable, Sequence

import pytest

import kernels

SOURCES = pathlib.Path(kernels.__file__).parent / "cpu"
_SHARED = ("native", "amx", "isa_amx_bf16", "cut_attention", "pool", "sample")
_TABLES = {
    "portable": "kPortable",
    "avx2": "kAvx2",
    "avx512": "kAvx512",
    "avx512_bf16": "kAvx512Bf16",
}
_NAMES = {"avx512f": "avx512"}


def find_compiler() -> str:
    """A C++ compiler; skips the test where there is none."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


class Builder:
    """Compiles what all variants share once, and links variants of it."""

    OPTIONS = ("-std=c++17", "-O1", "-w", "-fPIC", "-pthread", "-ffp-contract=off")

    def __init__(self, isa: str, directory: pathlib.Path, *, flags: Sequence[str] = ()) -> None:
        """Kernels for `isa` alone, a name that the library gives; `flags` for every file."""
        self._compiler = find_compiler()
        self._flags = flags
        own = _NAMES.get(isa, isa)
        self.isa_source = f"isa_{own}.cpp"
        stub = directory / "others.cpp"
        others = [table for name, table in _TABLES.items() if name != own]
        lines = [f"const Kernels* const {table} = nullptr;" for table in others]
        text = "\n".join(["namespace kv {", *lines, "}"])
        stub.write_text(f'#include "{SOURCES}/isa.h"\n{text}\n')
        shared = [SOURCES / f"{name}.cpp" for name in _SHARED]
        self._objects = {path.stem: self._compile(path, directory) for path in (*shared, stub)}

    def link(self, changed: Iterable[pathlib.Path], directory: pathlib.Path) -> pathlib.Path:
        """A library of the shared parts, with these sources in place of those of their names."""
        objects = self._objects | {path.stem: self._compile(path, directory) for path in changed}
        built = directory / "variant.so"
        self._run("-shared", *map(str, objects.values()), "-o", str(built))
        return built

    def _compile(self, source: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
        target = directory / f"{source.stem}.o"
        self._run("-c", str(source), "-o", str(target))
        return target

    def _run(self, *arguments: str) -> None:
        command = [self._compiler, *self.OPTIONS, *self._flags, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
