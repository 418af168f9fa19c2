"""Compiles recorded launches for cards that aren't there, and reads what the compiler made.

Knows Triton's compiler and the disassemblers in its wheel; no kernel by name.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.jit.launch import Launch, Target

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What matters of one compiled kernel."""

    registers: int
    spilled: int
    """Bytes of stack (CUDA) or spilled registers (ROCm)."""
    shared_bytes: int
    instructions: Counter[str]
    """By opcode with its modifiers, as in `HGMMA.64x64x16.F32.BF16`."""

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches the regular expression from its start."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile as Triton would at this launch on `target`: same types, constants, alignment."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or _is_one(value, parameter):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = _type_of(value)
        if not parameter.do_not_specialize and _is_aligned(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    if target.backend == "cuda":
        gpu = GPUTarget("cuda", int(target.arch.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", target.arch, 64)
    compiled = triton.compile(source, target=gpu, options=launch.options(target))
    read = _read_cuda if target.backend == "cuda" else _read_rocm
    return read(compiled, compiled.metadata.shared)


def _is_one(value: object, parameter: Any) -> bool:
    return type(value) is int and value == 1 and not parameter.do_not_specialize


def _is_aligned(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)


def _type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _read_cuda(compiled: Any, shared: int) -> Compiled:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        listing = _run("cuobjdump", "--dump-sass", file.name)
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.M)
    return Compiled(registers, stack + local, shared, Counter(opcodes))


def _read_rocm(compiled: Any, shared: int) -> Compiled:
    listing = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", listing)[1])

    opcodes = re.findall(r"^\s+([a-z]\w+)", listing, re.M)
    spilled = field("vgpr_spill_count") + field("private_segment_fixed_size")
    return Compiled(field("vgpr_count"), spilled, shared, Counter(opcodes))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [str(_TOOLS / tool), *arguments], check=True, capture_output=True, text=True
    ).stdout
