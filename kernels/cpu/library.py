"""The native library: where it is, whether it loads, what it can use of this CPU.

Built by the package's own build as `kernels.cpu._native`, a plain shared library with a C ABI:
no Python and no torch inside, so one build serves all of their versions. Knows no tensors.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import pathlib
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p

from kernels.errors import KernelUnavailableError

VERSION = 6
"""Of the interface between `native_ops` and the library; both must name the same."""

_REMEDY = "install kvpaging with a C++ compiler at hand (g++ or clang++)"

# Every function of work returns 0, 1 when memory ran out, 2 for an input out of range. The first
# argument is the context.
_WORK: dict[str, list[type]] = {
    "kv_pack_weight": [c_void_p, c_int64, c_int64, c_void_p],
    "kv_unpack_rows": [c_void_p, c_int64, c_void_p, c_int64, c_void_p],
    "kv_linear": [c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64,
                  c_int64, c_void_p, c_int],
    "kv_grouped_linear": [c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p,
                          c_void_p, c_int64, c_int64, c_int64, c_void_p],
    "kv_norm": [c_int, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int,
                c_float, c_float, c_void_p],
    "kv_gated": [c_int, c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    "kv_rope_store": [c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p,
                      c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p,
                      c_void_p, c_int, c_void_p, c_int, c_float, c_float, c_int64, c_int64,
                      c_int64, c_void_p],
    "kv_store_kv": [c_int, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int64,
                    c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64,
                    c_int64],
    "kv_paged_attention": [c_int, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64,
                           c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p,
                           c_int64, c_int64, c_int64, c_int64, c_int64, c_float, c_int64, c_float,
                           c_void_p, c_void_p, c_void_p],
    "kv_merge_states": [c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p,
                        c_void_p],
    "kv_log_softmax": [c_void_p, c_int64, c_int64, c_int64, c_void_p],
    "kv_sample": [c_void_p, c_int64, c_int64, c_int64, *[c_void_p] * 8],
    "kv_copy_pages": [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64],
}  # fmt: skip


@functools.cache
def load() -> ctypes.CDLL:
    """The library, its signatures set.

    Raises:
        KernelUnavailableError: it isn't built, doesn't load, or is of another version.
    """
    path = _find()
    if path is None:
        raise KernelUnavailableError(f"this installation has no native library: {_REMEDY}")
    try:
        return open_library(path)
    except OSError as error:
        raise KernelUnavailableError(f"the native library doesn't load: {error}") from error


def open_library(path: pathlib.Path) -> ctypes.CDLL:
    """Open a build of the library.

    Raises:
        OSError: the file can't be loaded.
        KernelUnavailableError: it is of another version.
    """
    library = ctypes.CDLL(str(path))
    found = library.kv_version()
    if found != VERSION:
        raise KernelUnavailableError(
            f"{path} is of version {found}, not {VERSION}: build it again (pip install)"
        )
    library.kv_isa.argtypes = [c_int]
    library.kv_isa.restype = c_char_p
    library.kv_create.argtypes = [c_int, c_char_p]
    library.kv_create.restype = c_void_p
    library.kv_threads.argtypes = [c_void_p]
    library.kv_destroy.argtypes = [c_void_p]
    library.kv_destroy.restype = None
    library.kv_record.argtypes = [c_void_p]
    library.kv_record.restype = c_void_p
    library.kv_play.argtypes = [c_void_p]
    library.kv_erase.argtypes = [c_void_p]
    library.kv_erase.restype = None
    library.kv_recorded.restype = None
    library.kv_packed_bytes.argtypes = [c_int64, c_int64]
    library.kv_packed_bytes.restype = c_int64
    for name, arguments in _WORK.items():
        function = getattr(library, name)
        function.argtypes = [c_void_p, *arguments]
        function.restype = c_int
    return library


def instruction_sets(library: ctypes.CDLL) -> tuple[str, ...]:
    """Those that the library has kernels for and this CPU can run, best first."""
    names = (library.kv_isa(i) for i in range(library.kv_num_isas()))
    return tuple(name.decode() for name in names if name is not None)


def describe() -> str:
    """What the library runs on here.

    Raises:
        KernelUnavailableError: it isn't built or doesn't load.
    """
    best, *others = instruction_sets(load())
    return f"{best} (also {', '.join(others)})" if others else best


def _find() -> pathlib.Path | None:
    directory = pathlib.Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = directory / f"_native{suffix}"
        if path.exists():
            return path
    return None
