"""Segments: files of values, one behind the other, appended to until sealed, never written again.

A segment describes itself: `scan` finds its values without an index. Every function opens the file
it needs and closes it again, so that a segment can be unlinked while others read it.

Knows nothing of room, of order between segments or of the index.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from kvpaging.base.ids import PageKey
from kvpaging.levels.codec import HEADER_BYTES, BadValue, read_header

_SUFFIX: Final = ".pages"
_MODE: Final = 0o600
_MAX_PIECES: Final = 512
"""Pieces that one call writes: systems allow 1024."""


class Entry(NamedTuple):
    """Where a page lies within a segment."""

    key: PageKey
    parent: PageKey
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + self.num_bytes


def path_of(directory: Path, segment_id: int) -> Path:
    """The file of a segment."""
    return directory / f"{segment_id:012d}{_SUFFIX}"


def sizes(directory: Path) -> dict[int, int]:
    """The bytes of every segment there, by id, oldest first."""
    return {
        int(path.stem): path.stat().st_size
        for path in sorted(directory.glob(f"*{_SUFFIX}"))
        if path.stem.isdecimal()
    }


def scan(path: Path, offset: int) -> Iterator[Entry]:
    """The values from `offset` on whose headers are sound and that the file holds to their end.

    Their digests are not checked here. Ends at the first value that is torn or broken, for nothing
    says where the next one begins. Raises OSError.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while True:
            try:
                header = read_header(os.pread(file.fileno(), HEADER_BYTES, offset))
            except BadValue:
                return
            entry = Entry(header.key, header.parent, offset, header.value_bytes)
            if entry.end > size:
                return
            yield entry
            offset = entry.end


def read(path: Path, offset: int, num_bytes: int) -> memoryview:
    """Bytes of a segment; fewer where the file ends. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return memoryview(os.pread(file, num_bytes, offset))
    finally:
        os.close(file)


def sync(path: Path) -> None:
    """Have the medium hold a file, or the names in a directory. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


class SegmentWriter:
    """The segment that is being appended to. One thread at a time."""

    def __init__(self, path: Path, end: int = 0) -> None:
        """Continue (or begin) the file behind its first `end` bytes. Raises OSError."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, _MODE)
        self.end = end
        os.ftruncate(self._file, end)

    def append(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Write all of `pieces` behind the end, or nothing of them. Raises OSError."""
        at = self.end
        try:
            for first in range(0, len(pieces), _MAX_PIECES):
                at = self._write(pieces[first : first + _MAX_PIECES], at)
        except OSError:
            os.ftruncate(self._file, self.end)
            raise
        self.end = at

    def _write(self, pieces: Sequence[bytes | memoryview], at: int) -> int:
        written = os.pwritev(self._file, pieces, at)
        if written < sum(map(len, pieces)):  # a full disk or a signal: go on with what is left
            rest = memoryview(b"".join(pieces))
            while written < len(rest):
                written += os.pwrite(self._file, rest[written:], at + written)
        return at + written

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
