"""Which pages lie where in which segment, so that opening a store reads no segment.

A convenience, never the truth: the segments describe themselves, and a stretch that the index does
not know, or whose digest fails, is scanned. So nothing here waits for the medium, and whatever
happens to the file costs a scan at most. A page's parent is there too: it tells in which order
pages leave.

SQLite from the standard library, one row for a stretch of a segment. `docs/levels.md` says why not
LMDB or RocksDB. Knows nothing of values or of room.
"""

from __future__ import annotations

import os
import sqlite3
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from kvpaging.base.ids import PageKey
from kvpaging.levels.segment import Entry

_VERSION: Final = 2
_ENTRY: Final = struct.Struct("<32s32sQI")
_BLOCK_BYTES: Final = 4096
_BLOCKS_A_COMMIT: Final = 16
"""Blocks of SQLite's own (the tree's nodes, its list of free blocks) that one commit may change."""
_SCHEMA: Final = """
    CREATE TABLE IF NOT EXISTS stretches (
        segment INTEGER NOT NULL,
        first_byte INTEGER NOT NULL,
        end_byte INTEGER NOT NULL,
        entries BLOB NOT NULL,
        digest BLOB NOT NULL,
        PRIMARY KEY (segment, first_byte)
    )
"""


class Stretch(NamedTuple):
    """What lies in the bytes from `first_byte` to `end_byte` of a segment."""

    segment: int
    first_byte: int
    end_byte: int
    entries: list[Entry]


def _digest(segment: int, first_byte: int, end_byte: int, entries: bytes) -> bytes:
    packed = struct.pack("<QQQ", segment, first_byte, end_byte)
    return xxhash.xxh3_128_digest(packed + entries)


class SegmentIndex:
    """The file of stretches. One thread at a time; every method may raise `sqlite3.Error`.

    Its file may grow to half as much again as the entries need, and its journal to that as well:
    `bytes_after` says how far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute(f"PRAGMA page_size = {_BLOCK_BYTES}")
            self._db.execute("PRAGMA journal_mode = TRUNCATE")
            self._db.execute("PRAGMA synchronous = OFF")
            self._db.execute(_SCHEMA)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise sqlite3.DatabaseError(f"the index has format {version}, this is {_VERSION}")
            self._db.execute(f"PRAGMA user_version = {_VERSION}")
        except BaseException:
            self._db.close()
            raise

    @staticmethod
    def remove(path: Path) -> None:
        """Delete the index's files; the next one begins empty. Raises OSError."""
        for name in (path, path.with_name(path.name + "-journal")):
            name.unlink(missing_ok=True)

    @property
    def num_bytes(self) -> int:
        """Bytes of its files now."""
        journal = self._path.with_name(self._path.name + "-journal")
        return sum(name.stat().st_size for name in (self._path, journal) if name.exists())

    @staticmethod
    def growth_bytes(num_entries: int) -> int:
        """Bytes by which adding a stretch of so many entries may grow the files, at any moment."""
        blob_blocks = num_entries * _ENTRY.size // (_BLOCK_BYTES - 4) + 1
        return 2 * (blob_blocks + _BLOCKS_A_COMMIT) * _BLOCK_BYTES

    def stretches(self) -> list[Stretch]:
        """All that are sound, in the order of segments and bytes."""
        rows = self._db.execute(
            "SELECT segment, first_byte, end_byte, entries, digest FROM stretches"
            " ORDER BY segment, first_byte"
        )
        return [
            Stretch(segment, first, end, _unpack(entries))
            for segment, first, end, entries, digest in rows
            if _is_sound(segment, first, end, entries, digest)
        ]

    def add(self, segment: int, first_byte: int, end_byte: int, entries: Sequence[Entry]) -> None:
        """Say what lies in these bytes."""
        packed = b"".join(_ENTRY.pack(*entry) for entry in entries)
        digest = _digest(segment, first_byte, end_byte, packed)
        self._db.execute(
            "INSERT OR REPLACE INTO stretches VALUES (?, ?, ?, ?, ?)",
            (segment, first_byte, end_byte, packed, digest),
        )

    def forget(self, segments: Iterable[int]) -> None:
        """These segments are gone."""
        self._db.executemany("DELETE FROM stretches WHERE segment = ?", [(s,) for s in segments])

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        self._db.close()


def _is_sound(segment: object, first: object, end: object, entries: object, digest: object) -> bool:
    """Whether a row is what was written; of a damaged file SQLite may give any types."""
    return (
        isinstance(segment, int)
        and isinstance(first, int)
        and isinstance(end, int)
        and isinstance(entries, bytes)
        and 0 <= segment < 1 << 63
        and 0 <= first <= end
        and _digest(segment, first, end, entries) == digest
    )


def _unpack(entries: bytes) -> list[Entry]:
    found: list[Entry] = []
    before = PageKey(b"")
    for key, parent, offset, num_bytes in _ENTRY.iter_unpack(entries):
        # As a rule the page before it in its chain lies before it: one object for both.
        found.append(
            Entry(PageKey(key), before if parent == before else PageKey(parent), offset, num_bytes)
        )
        before = found[-1].key
    return found
