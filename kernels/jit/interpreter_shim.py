"""Makes Triton's interpreter compute as a card does. For tests, under TRITON_INTERPRET=1.

bfloat16: the interpreter keeps it as the whole number of its bit pattern and then adds, compares
and multiplies the patterns (3.6 to 3.9; upstream: "we just don't support it yet", triton PR 11585).
Here each operation on bfloat16 goes through float32 and rounds to nearest, ties to even.

float8e4nv: the interpreter loses the carry of a mantissa that rounds up to the next power of two,
and cuts small numbers off (3.9). Here torch converts.

tl.dot: the interpreter asks BLAS, which sums a row in an order that depends on the row's place.
Here each element is one chain over ascending K in float32, as the kernels count on.

The kernels stay as they are. Knows the interpreter's inner names; a test fails when they move.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Patch the interpreter of this process; doing it again changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "computes_bfloat16", False):
        return
    handle = interpreter.TensorHandle

    def widened(value: Any) -> Any:
        return handle(_to_float32(value.data), tl.float32) if _is_bfloat16(value) else value

    def narrowed(value: Any) -> Any:
        # Comparisons give booleans, which stay.
        if value.data.dtype != np.float32:
            return value
        return handle(_to_bfloat16(value.data), tl.bfloat16)

    def through_float32(method: Any) -> Any:
        def computed(self: Any, *args: Any) -> Any:
            if not any(_is_bfloat16(arg) for arg in args):
                return method(self, *args)
            return narrowed(method(self, *map(widened, args)))

        return computed

    def cast(method: Any) -> Any:
        def computed(self: Any, source: Any, target: Any, *rest: Any) -> Any:
            if target.scalar == tl.float8e4nv and source.data.dtype == np.float32:
                return handle(_to_float8(source.data), tl.float8e4nv)
            if target.scalar == tl.bfloat16 and not _is_bfloat16(source):
                wide = method(self, source, tl.float32, *rest)
                return handle(_to_bfloat16(wide.data), tl.bfloat16)
            if _is_bfloat16(source) and target.scalar != tl.bfloat16:
                if target.scalar == tl.float32:
                    return widened(source)
                return method(self, widened(source), target, *rest)
            return method(self, source, target, *rest)

        return computed

    def dot(self: Any, a: Any, b: Any, start: Any, *_: Any) -> Any:
        left, right = (np.asarray(widened(side).data, dtype=start.data.dtype) for side in (a, b))
        total = start.data.copy()
        for k in range(left.shape[-1]):
            total += left[:, k, None] * right[k]
        return handle(total, start.dtype.scalar)

    for name in ("binary_op", "unary_op"):
        setattr(builder, name, through_float32(getattr(builder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, cast(getattr(builder, name)))
    builder.create_dot = dot
    builder.computes_bfloat16 = True


def _is_bfloat16(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and getattr(dtype, "scalar", None) == tl.bfloat16


def _to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_float8(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    narrow = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
    return np.asarray(narrow.view(torch.uint8).numpy())


def _to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding would carry a NaN over to infinity or 0.
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
