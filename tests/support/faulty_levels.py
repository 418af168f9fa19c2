"""All levels under the digest model, with a real mover, and everything that can go wrong in them.

The pool is a real one: a token lies in its page twice, so that half a page is seen. The remote
server is a dictionary. What is injected:

    any level      hangs, raises, is full, forgets, answers with other pages, other tokens, a part
    disk           flipped bits, a cut-off or deleted segment, a write that stops in the middle
    remote         dead, answers a part, refuses, other bytes, another page's bytes
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digest_model import GARBAGE, DigestExecutor

from kernels.reference import TorchOps
from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import PageKey
from kvpaging.base.kv_spec import KVSpec
from kvpaging.cache.lower_levels import LevelsFlushed, PagesLoaded
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.page_mover import LevelSetting, PageMover
from kvpaging.levels.disk import MIN_CAPACITY_BYTES, DiskLevel
from kvpaging.levels.host import HostLevel
from kvpaging.levels.level import Level, LevelStats, StoredPage
from kvpaging.levels.overflow import Overflow
from kvpaging.levels.redis_link import Refusal
from kvpaging.levels.remote import RemoteLevel
from kvpaging.levels.segment import SegmentWriter
from kvpaging.scheduling.plan import StepPlan, StepResult

HEAD = 64
MOODS = ("hangs", "raises", "full", "forgets", "other page", "other tokens", "a part")
SERVER_MOODS = ("dead", "cut", "refuses", "other bytes", "swapped")


class Moody:
    """A level that does what its mood says; a `level.Level`."""

    def __init__(self, level: Level, rng: random.Random) -> None:
        self.level = level
        self.name = level.name
        self.mood = "well"
        self.num_faults = dict.fromkeys(MOODS, 0)
        self._rng = rng
        self._released = threading.Event()

    def be(self, mood: str) -> None:
        """Change the mood; who hangs goes on."""
        self.mood = mood
        self._released.set()
        self._released = threading.Event()

    def contains(self, keys: Sequence[PageKey]) -> list[bool]:
        return self.level.contains(keys)

    def load(self, keys: Sequence[PageKey], deadline_s: float) -> list[StoredPage | None]:
        mood = self._strike()
        found = self.level.load(keys, deadline_s)
        pages = [page for page in found if page is not None]
        if mood == "forgets":
            return [page if self._rng.random() < 0.5 else None for page in found]
        if mood == "other page" and pages:
            return [page and self._rng.choice(pages) for page in found]
        if mood == "other tokens":
            return [page and page._replace(tokens=page.tokens[::-1] + b"\1") for page in found]
        if mood == "a part":
            return [page and page._replace(payload=page.payload[:-4]) for page in found]
        return found

    def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
        if self._strike() == "full":
            return 0
        return self.level.store(pages, deadline_s)

    def touch(self, keys: Sequence[PageKey]) -> list[bool]:
        self._strike()
        return self.level.touch(keys)

    def clear(self) -> None:
        self.level.clear()

    def evicted(self, keys: Sequence[PageKey]) -> list[Evicted | None]:
        return self.level.evicted(keys)

    def stats(self) -> LevelStats:
        return self.level.stats()

    def close(self) -> None:
        self.be("well")
        self.level.close()

    def _strike(self) -> str:
        mood = self.mood
        if mood in self.num_faults:
            self.num_faults[mood] += 1
        if mood == "raises":
            raise RuntimeError("a bug of the level's")
        if mood == "hangs":
            self._released.wait(10)
        return mood


class MoodyServer:
    """What `RedisLink` is to a server, over a dictionary that may be shared."""

    address = "nowhere"

    def __init__(self, values: dict[bytes, bytes], rng: random.Random) -> None:
        self.values = values
        self.mood = "well"
        self._rng = rng

    def call(
        self, commands: Sequence[tuple[Any, ...]], deadline_s: float
    ) -> tuple[list[object], str | None]:
        replies: list[object] = []
        for command in commands:
            if self.mood == "dead" or (self.mood == "cut" and self._rng.random() < 0.3):
                return replies, "the connection is gone"
            replies.append(self._answer(command))
        return replies, None

    def close(self) -> None:
        pass

    def _answer(self, command: tuple[Any, ...]) -> object:
        if self.mood == "refuses":
            return Refusal("OOM command not allowed")
        match command:
            case (b"GET", name):
                return self._value(name)
            case (b"SET", name, value, *_):
                self.values[name] = bytes(value)
                return b"OK"
            case (b"PEXPIRE", name, _):
                return int(name in self.values)
            case (b"SCAN", *_):
                return [b"0", list(self.values)]
            case (b"UNLINK", name):
                return int(self.values.pop(name, None) is not None)
        raise AssertionError(command)

    def _value(self, name: bytes) -> bytes | None:
        value = self.values.get(name)
        if value is None or self.mood not in ("other bytes", "swapped"):
            return value
        if self.mood == "swapped":
            return self._rng.choice(list(self.values.values()))
        changed = bytearray(value)
        changed[self._rng.randrange(len(changed))] ^= 1 << self._rng.randrange(8)
        return bytes(changed[: self._rng.choice([len(changed), len(changed) - 1])])


class HalfWriter(SegmentWriter):
    """A disk that is full in the middle of a write, while `is_full`."""

    is_full = False

    def _write(self, pieces: Sequence[bytes | memoryview], at: int) -> int:
        if self.is_full:
            data = b"".join(pieces)
            os.pwrite(self._file, data[: len(data) // 2], at)
            raise OSError(errno.ENOSPC, "no space left on device")
        return super()._write(pieces, at)


def damage(directory: Path, rng: random.Random) -> None:
    """Change, cut or delete one of the disk level's segments."""
    paths = sorted(directory.glob("*.pages"))
    if not paths:
        return
    path = rng.choice(paths)
    with contextlib.suppress(FileNotFoundError):  # compacted away meanwhile
        _damage(path, rng)


def _damage(path: Path, rng: random.Random) -> None:
    size = path.stat().st_size
    match rng.choice(["flip", "flip", "flip", "cut", "delete"]):
        case "flip" if size:
            with path.open("r+b") as file:
                file.seek(rng.randrange(size))
                # Its level, at work meanwhile, may have cut it.
                for byte in file.read(1):
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte ^ 1 << rng.randrange(8)]))
        case "cut":
            os.truncate(path, rng.randrange(size + 1))
        case "delete":
            path.unlink()


class PoolSlots:
    """The pool's slots as a list of tokens."""

    def __init__(self, pool: KVPool) -> None:
        pages = pool.pages.view(torch.float32).numpy()
        size = pool.spec.page_size
        shape = (len(pages), 2, size, HEAD)
        self._size = size
        self._cells = pages.reshape(shape)
        self[:] = [GARBAGE] * (len(pages) * size)

    def _both(self, index: int | slice) -> tuple[np.ndarray, np.ndarray]:
        pages, slots = np.divmod(np.arange(len(self._cells) * self._size)[index], self._size)
        return self._cells[pages, 0, slots, 0], self._cells[pages, 1, slots, -1]

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            key, value = self._both(index)
            assert np.array_equal(key * 2 + 1, value), "half a page"
            return [int(token) for token in key]
        page, slot = divmod(index, self._size)
        token = int(self._cells[page, 0, slot, 0])
        assert token * 2 + 1 == int(self._cells[page, 1, slot, -1]), "half a page"
        return token

    def __setitem__(self, index: int | slice, tokens: Any) -> None:
        if isinstance(index, slice):
            numbers = range(len(self._cells) * self._size)[index]
            for number, token in zip(numbers, tokens, strict=True):
                self[number] = token
            return
        page, slot = divmod(index, self._size)
        self._cells[page, 0, slot, 0] = token = tokens
        self._cells[page, 1, slot, -1] = token * 2 + 1


class FaultyLevels:
    """Host, disk and remote level, and what is wrong with them now."""

    def __init__(
        self,
        directory: Path,
        page_size: int,
        rng: random.Random,
        clock: Callable[[], float],
        *,
        values: dict[bytes, bytes],
        num_host_pages: int = 30,
        min_uses: tuple[int, int, int] = (0, 1, 2),
    ) -> None:
        self.directory = directory
        self.rng = rng
        page_bytes = 2 * page_size * HEAD * 4
        root = bytes(32)
        remote = RemoteLevel(
            "redis://nowhere", secret=b"s" * 32, root=root, item_bytes=4, clock=clock
        )
        remote._link.close()
        self.server = MoodyServer(values, rng)
        remote._link = self.server  # type: ignore[assignment]
        far = Moody(remote, rng)
        ways = [None, Overflow(far), None]
        # Some 60 pages: what lies in it must go round.
        disk = self.disk = DiskLevel(
            directory,
            MIN_CAPACITY_BYTES,
            root=root,
            item_bytes=4,
            compress=rng.random() < 0.5,
            segment_bytes=MIN_CAPACITY_BYTES // 8,
            overflow=ways[1],
        )
        middle = Moody(disk, rng)
        if not min_uses[0] and not min_uses[1]:
            ways[0] = Overflow(middle)
        host = HostLevel(num_host_pages * (page_bytes + 600), overflow=ways[0])
        self.levels = [Moody(host, rng), middle, far]
        self.settings = [
            LevelSetting(level, uses, 1.0, way)
            for level, uses, way in zip(self.levels, min_uses, ways, strict=True)
        ]

    def strike(self) -> None:
        """Something changes, for the worse or the better."""
        rng = self.rng
        match rng.randrange(6):
            case 0:
                self.server.mood = rng.choice(["well", *SERVER_MOODS])
            case 1:
                damage(self.directory, rng)
            case 2:
                HalfWriter.is_full = rng.random() < 0.5
            case _:
                rng.choice(self.levels).be(rng.choice(["well"] * len(MOODS) + list(MOODS)))

    def heal(self) -> None:
        """Nothing is wrong any more, but for what is lost."""
        self.server.mood = "well"
        HalfWriter.is_full = False
        for level in self.levels:
            level.be("well")


class MovingExecutor(DigestExecutor):
    """The digest model over a real pool and a real mover."""

    def __init__(
        self, num_pages: int, page_size: int, below: FaultyLevels, clock: Callable[[], float]
    ) -> None:
        super().__init__(num_pages, page_size)
        spec = KVSpec(1, 1, HEAD, page_size, "float32")
        self.pool = KVPool(spec, num_pages, torch.device("cpu"))
        self.slots = PoolSlots(self.pool)  # type: ignore[assignment]
        self.mover = PageMover(self.pool, TorchOps(), below.settings, give_up_s=5.0, clock=clock)

    @property
    def lower_levels(self) -> PageMover:  # type: ignore[override]
        return self.mover

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.clear()
        self.mover.store(plan.stores)
        self.mover.touch(plan.touches)
        for load in plan.loads:
            for page_id in load.page_ids:
                first = page_id * self.page_size
                self.slots[first : first + self.page_size] = [GARBAGE] * self.page_size
            self.mover.begin(load)
        for flush in plan.flushes:
            self.mover.flush(flush)
        return super().run(plan)

    def completions(self) -> tuple[PagesLoaded | LevelsFlushed, ...]:
        return self.mover.completions()

    def wait(self, timeout_s: float) -> None:
        self.mover.wait(0.0005)

    def close(self) -> None:
        self.mover.close()
        super().close()


def killed(directory: Path, rng: random.Random) -> Path:
    """A copy of the disk level's directory as a kill leaves it: maybe within a write."""
    copy = directory.with_name(f"{directory.name}-")
    copy.mkdir()
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it left meanwhile
            shutil.copy2(path, copy)
    paths = sorted(copy.glob("*.pages"))
    if paths and rng.random() < 0.7:
        os.truncate(paths[-1], max(0, paths[-1].stat().st_size - rng.randrange(3000)))
    return copy
