"""One safetensors file, mapped into memory: names, shapes, and tensors without a copy.

The format (huggingface/safetensors, README "Format"): an unsigned 64-bit length N, N bytes of JSON
that give each tensor's dtype, shape and byte range, then the bytes. It is read here rather than
through the library because only the owner of the mapping can give its pages back while a large
checkpoint loads (`drop`): mapped pages count as memory of the process until then.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Final

import msgspec
import torch

from kvpaging.base.errors import ConfigError

_MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit."""

_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(msgspec.Struct, frozen=True):
    """Where one tensor lies."""

    dtype: str
    """As the file says it, such as `BF16`."""
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start


class SafetensorsFile:
    """A mapped file. Opening reads the header only; raises `ConfigError` when it is malformed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            # A private mapping: torch wants memory that could be written, and nothing is.
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except ValueError:
                raise ConfigError(f"{path}: is empty") from None
        self.tensors = _read_header(path, self._map)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a view of the mapping: touching it reads the file. Never write to it."""
        info = self.tensors[name]
        dtype = _DTYPES.get(info.dtype)
        if dtype is None:
            raise ConfigError(
                f"{self.path}: tensor {name} is of type {info.dtype}, which is not supported"
            )
        count = math.prod(info.shape)
        if count * dtype.itemsize != info.num_bytes:
            raise ConfigError(
                f"{self.path}: tensor {name} of {count} numbers has {info.num_bytes} bytes"
            )
        if count == 0:
            return torch.empty(info.shape, dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=info.start)
        return flat.view(info.shape)

    def drop(self, name: str) -> None:
        """Give the tensor's mapped pages back; touching it again reads the file again."""
        info = self.tensors[name]
        page = mmap.PAGESIZE
        first, last = -(-info.start // page) * page, info.stop // page * page
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _read_header(path: Path, data: mmap.mmap) -> dict[str, TensorInfo]:
    if len(data) < 8:
        raise ConfigError(f"{path}: is too short for a safetensors file")
    (length,) = struct.unpack("<Q", data[:8])
    begin = 8 + length
    if length > _MAX_HEADER_BYTES or begin > len(data):
        raise ConfigError(f"{path}: is not a safetensors file, or is cut off")
    try:
        header = msgspec.json.decode(data[8:begin], type=dict[str, object])
        header.pop("__metadata__", None)
        entries = msgspec.convert(header, type=dict[str, _Entry])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: malformed safetensors header ({error})") from error
    tensors = {}
    for name, entry in entries.items():
        start, stop = entry.data_offsets
        if not (0 <= start <= stop and begin + stop <= len(data)):
            raise ConfigError(f"{path}: tensor {name} lies beyond the file's end; is it cut off?")
        tensors[name] = TensorInfo(entry.dtype, entry.shape, begin + start, begin + stop)
    return tensors
