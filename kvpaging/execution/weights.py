"""A checkpoint's tensors, straight to their place in the model.

The model asks for its parameters in forward order and says under which names the checkpoint keeps
their parts; each is allocated once, in the dtype that computes, and its parts are copied in from
the mapped files, whose pages are given back as it goes. So memory at start peaks at the weights
plus the largest single one.

Every tensor of the checkpoint is used exactly once or is on the model's list of ignored ones;
otherwise loading fails and names it. Safetensors only: other formats can run code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec
import torch
import xxhash

from kernels.ops import Linear, Ops
from kvpaging.base.errors import ConfigError
from kvpaging.execution.safetensors_file import SafetensorsFile

OnProgress = Callable[[str, int, int], None]
"""Stage, bytes done, bytes in all (0: unknown)."""

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"

_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_CHUNK_BYTES: Final = 64 * 1024 * 1024
"""Of a mapped tensor, at most so much is in memory at a time."""


class Checkpoint:
    """All safetensors files of a directory, as one set of named tensors."""

    def __init__(self, model_dir: Path) -> None:
        """Open the files, reading headers only. Raises `ConfigError` when they don't fit."""
        self._file_of: dict[str, SafetensorsFile] = {}
        expected = _index(model_dir)
        for path in _files(model_dir, expected):
            file = SafetensorsFile(path)
            for name in file.tensors:
                if name in self._file_of:
                    other = self._file_of[name].path.name
                    raise ConfigError(f"{model_dir}: {name} is in {other} and in {path.name}")
                self._file_of[name] = file
        missing = sorted(set(expected) - set(self._file_of))
        if missing:
            raise ConfigError(f"{model_dir}: {_some(missing)} of {INDEX_NAME} in no file")

    @property
    def names(self) -> frozenset[str]:
        """All tensors' names."""
        return frozenset(self._file_of)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(file.tensors[name].num_bytes for name, file in self._file_of.items())

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(_count(file.tensors[name].shape) for name, file in self._file_of.items())

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Its shape, `None` where there is no such tensor."""
        file = self._file_of.get(name)
        return None if file is None else file.tensors[name].shape

    def copy(self, name: str, target: torch.Tensor) -> tuple[int, str]:
        """Copy a tensor into `target` of the same shape, converting.

        Returns how many bytes it has in the file, and their xxh3-128. The file's pages are given
        back as it goes. Raises `ConfigError` when it holds no floating point numbers.
        """
        file = self._file_of[name]
        info = file.tensors[name]
        if info.dtype not in _FLOATS:
            raise ConfigError(
                f"{file.path.name}: {name} is of type {info.dtype}; quantized checkpoints are not "
                "supported, use one in bfloat16, float16 or float32"
            )
        source = file.tensor(name)
        digest = xxhash.xxh3_128()
        if info.num_bytes:
            rows_at_once = max(1, _CHUNK_BYTES * len(source) // info.num_bytes)
            for start in range(0, len(source), rows_at_once):
                rows = source[start : start + rows_at_once]
                digest.update(rows.view(-1).view(torch.uint8).numpy().data)
                target[start : start + rows_at_once] = rows
                file.drop(name)
        return info.num_bytes, digest.hexdigest()


class Parameters:
    """Hands a model its parameters on the device, each once, and keeps the account.

    `prefix` goes before every name; `at` makes one for a part of the model, with the same account.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
        on_progress: OnProgress | None = None,
        quantization: str | None = None,
    ) -> None:
        self.ops = ops
        self.device = device
        self.dtype = dtype
        self._quantization = quantization
        self._prefix = ""
        self._account = _Account(checkpoint, on_progress)

    def at(self, prefix: str) -> Parameters:
        """The same parameters, seen from `prefix`."""
        inner = object.__new__(Parameters)
        inner.__dict__.update(self.__dict__)
        inner._prefix = self._prefix + prefix
        return inner

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A `[size]` parameter, such as a norm's weight."""
        return self._filled([name], [size], ())

    def matrix(self, name: str, num_rows: int, num_columns: int) -> torch.Tensor:
        """A `[num_rows, num_columns]` parameter as it is, such as an embedding."""
        return self._filled([name], [num_rows], (num_columns,))

    def linear(
        self,
        names: Sequence[str],
        num_rows: Sequence[int],
        num_columns: int,
        *,
        bias: bool = False,
    ) -> Linear:
        """One weight for all of `names`, below each other, and their biases likewise.

        `name.weight` is `[num_rows[i], num_columns]`, `name.bias` is `[num_rows[i]]`. Quantized
        where the operator asked for it; raises `ConfigError` where the weight can't be.
        """
        weight, added = self._parts_of_linear(names, num_rows, num_columns, bias)
        if self._quantization is None:
            return self.ops.prepare_linear(weight, added)
        try:
            return self.ops.prepare_int8_linear(weight, added)
        except ValueError as error:
            names_read = ", ".join(self._prefix + name for name in names)
            raise ConfigError(
                f"quantization: {self._quantization}: {names_read}: {error}"
            ) from error

    def whole_linear(self, name: str, num_rows: int, num_columns: int) -> Linear:
        """A weight that is never quantized: a few numbers that decide much, or an embedding."""
        weight, _ = self._parts_of_linear((name,), (num_rows,), num_columns, False)
        return self.ops.prepare_linear(weight)

    def _parts_of_linear(
        self, names: Sequence[str], num_rows: Sequence[int], num_columns: int, bias: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = self._filled([f"{name}.weight" for name in names], num_rows, (num_columns,))
        added = self._filled([f"{name}.bias" for name in names], num_rows, ()) if bias else None
        return weight, added

    def finish(self, ignored: Sequence[str] = ()) -> bytes:
        """Check that nothing is left over, and return the fingerprint of all that was read.

        `ignored` are regular expressions of tensors that the model knows not to need. Raises
        `ConfigError` naming tensors that nobody asked for.
        """
        return self._account.finish(ignored)

    def _filled(
        self, names: Sequence[str], num_rows: Sequence[int], row_shape: tuple[int, ...]
    ) -> torch.Tensor:
        target = torch.empty((sum(num_rows), *row_shape), dtype=self.dtype, device=self.device)
        parts = torch.split(target, list(num_rows))
        for name, part in zip(names, parts, strict=True):
            self._account.take(self._prefix + name, part)
        return target


class _Account:
    """What was taken so far, of what."""

    def __init__(self, checkpoint: Checkpoint, on_progress: OnProgress | None) -> None:
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self._taken: set[str] = set()
        self._done_bytes = 0
        self._total_bytes = checkpoint.num_bytes
        self._fingerprint = sha256()

    def take(self, name: str, target: torch.Tensor) -> None:
        shape = self._checkpoint.shape(name)
        if shape is None:
            raise ConfigError(f"the checkpoint has no tensor {name}, which the model needs")
        if shape != tuple(target.shape):
            raise ConfigError(
                f"the checkpoint's tensor {name} has shape {list(shape)}; "
                f"its config.json makes it {list(target.shape)}"
            )
        if name in self._taken:
            raise ConfigError(f"the model asked for {name} twice")
        self._taken.add(name)
        num_bytes, digest = self._checkpoint.copy(name, target)
        line = f"{name} {target.dtype} {list(shape)} {digest}\n"
        self._fingerprint.update(line.encode())
        self._done_bytes += num_bytes
        if self._on_progress is not None:
            self._on_progress("loading weights", self._done_bytes, self._total_bytes)

    def finish(self, ignored: Sequence[str]) -> bytes:
        patterns = [re.compile(pattern) for pattern in ignored]
        left = sorted(
            name
            for name in self._checkpoint.names - self._taken
            if not any(pattern.fullmatch(name) for pattern in patterns)
        )
        if left:
            raise ConfigError(
                f"the checkpoint holds {_some(left)}, which the model does not know: "
                "config.json and the weights don't belong together"
            )
        if self._on_progress is not None:  # what was ignored is done too
            self._on_progress("loading weights", self._total_bytes, self._total_bytes)
        return self._fingerprint.digest()


def _index(model_dir: Path) -> dict[str, str]:
    """The file of each tensor by the index of a sharded checkpoint; empty without an index."""
    path = model_dir / INDEX_NAME
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: can't be read ({error})") from error


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _files(model_dir: Path, index: dict[str, str]) -> list[Path]:
    names = sorted(set(index.values())) or [SINGLE_NAME]
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{model_dir / INDEX_NAME}: {name!r} is not a plain file name")
    absent = [name for name in names if not (model_dir / name).exists()]
    if not absent:
        return [model_dir / name for name in names]
    if any(model_dir.glob("*.bin")) or any(model_dir.glob("*.pt*")):
        raise ConfigError(
            f"{model_dir}: holds weights in PyTorch's pickle format, which can run code; convert "
            "them with `AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)` of the "
            "transformers package"
        )
    raise ConfigError(f"{model_dir}: no {_some(absent)}; is the download complete?")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _some(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
