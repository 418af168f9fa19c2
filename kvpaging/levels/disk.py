"""Pages on a disk: a log of segments, an index beside it, one bound in bytes over all of it.

Pages are appended to the newest segment. When there is no room the oldest segment goes; its pages
that were used since they were written are appended again, up to half of it, so that a page in use
stays and every turn frees room. Corrupt and forgotten pages leave with their segment. What is in
the oldest segment goes on its way to the next level, if there is one, before its room is needed:
nobody waits for that, and it takes no room and no more memory than a batch.

A process that is killed at any moment, a full disk and flipped bits cost misses, never a wrong
page: a page counts when it is whole behind its header, and every read checks its digest. The end of
the machine may cost what the system had not written back yet.

Where each page lies is kept in memory (some 300 bytes a page), so that `contains` touches no disk.
Knows nothing of the tokens' meaning or of who uses the pages.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import secrets
import sqlite3
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from kvpaging.base.clock import Clock, monotonic
from kvpaging.base.errors import ConfigError
from kvpaging.base.evictions import Evicted, EvictionCause, EvictionLog
from kvpaging.base.ids import PageKey
from kvpaging.base.secret_file import read_secret
from kvpaging.base.threads import give_way
from kvpaging.levels import segment
from kvpaging.levels.codec import BadValue, PageCodec
from kvpaging.levels.level import Complaints, Counters, LevelStats, StoredPage
from kvpaging.levels.overflow import Overflow
from kvpaging.levels.segment import Entry, SegmentWriter
from kvpaging.levels.segment_index import SegmentIndex

MIN_CAPACITY_BYTES: Final = 1 << 20
_SEGMENTS: Final = 64
_SMALLEST_SEGMENT_BYTES: Final = 8 << 20
_LARGEST_SEGMENT_BYTES: Final = 256 << 20
_MOVE_BYTES: Final = 1 << 20
"""About what is read or written at once, and handed to one thread to pack or check."""
_MAX_WORKERS: Final = 4
_ENTRIES_A_STRETCH: Final = 1024
_INDEX_NAME: Final = "index.sqlite"
_LOCK_NAME: Final = "lock"
_SECRET_NAME: Final = "secret"

_Item = TypeVar("_Item")
_Done = TypeVar("_Done")


_Place = tuple[int, int, int]
"""Segment, offset, bytes. A plain tuple: the garbage collector need not look at a million."""


class _Value:
    """The pieces of one page's value."""

    __slots__ = ("num_bytes", "pieces")

    def __init__(self, pieces: list[bytes | memoryview]) -> None:
        self.pieces = pieces
        self.num_bytes = sum(map(len, pieces))


@dataclass(slots=True)
class _Segment:
    num_bytes: int = 0
    keys: list[PageKey] = field(default_factory=list)


@dataclass(slots=True)
class _Run:
    """Pages that lie one behind the other and are read at once."""

    segment: int
    offset: int
    num_bytes: int
    wanted: list[tuple[int, PageKey, _Place]]
    """Their positions in the call, keys and places."""

    @property
    def end(self) -> int:
        """The offset behind the last."""
        return self.offset + self.num_bytes


def _segment_bytes(capacity_bytes: int) -> int:
    smallest = min(_SMALLEST_SEGMENT_BYTES, capacity_bytes // 4)
    return min(_LARGEST_SEGMENT_BYTES, max(smallest, capacity_bytes // _SEGMENTS))


class DiskLevel:
    """At most `capacity_bytes` of files in a directory of its own; a `level.Level`."""

    name = "disk"

    def __init__(
        self,
        directory: Path,
        capacity_bytes: int,
        *,
        root: bytes,
        item_bytes: int,
        compress: bool = False,
        segment_bytes: int | None = None,
        overflow: Overflow | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """Open the directory, or make it, and find the pages that it holds.

        Raises ConfigError when it can't be used: another server has it, it holds other things, it
        can't be written, or `capacity_bytes` is less than `MIN_CAPACITY_BYTES`.

        Args:
            directory: made with mode 0700 where it is not there.
            capacity_bytes: the bound over segments and index; what is there beyond it goes.
            root: the numerics identity's root key; pages of another root are never answered and
                leave in their turn.
            item_bytes: the size of the payload's items (2 for bfloat16).
            compress: whether new pages are compressed: a third less room, for processor time
                (`docs/levels.md` has figures). What is there is read either way.
            segment_bytes: where a segment is sealed; the default is a 64th of the capacity.
            overflow: where pages go that leave for lack of room.
            clock: for deadlines and times.
        """
        if capacity_bytes < MIN_CAPACITY_BYTES:
            raise ConfigError(
                f"the disk cache's size is {capacity_bytes} bytes; "
                f"give it at least {MIN_CAPACITY_BYTES}"
            )
        self._directory = directory
        self._capacity_bytes = capacity_bytes
        self._segment_bytes = segment_bytes or _segment_bytes(capacity_bytes)
        self._codec = PageCodec(root, item_bytes, compress=compress)
        self._overflow = overflow
        self._clock = clock
        self._counters = Counters()
        self._evictions = EvictionLog()
        self._complaints = Complaints(logging.getLogger(__name__), clock)
        self._places: dict[PageKey, _Place] = {}
        self._used: set[PageKey] = set()
        self._places_lock = threading.Lock()
        """For changes to the three above; held for moments. Looking a page up needs no lock."""
        self._write_lock = threading.Lock()
        """For everything below; held while writing."""
        self._segments: dict[int, _Segment] = {}
        self._num_bytes = 0
        self._writer: SegmentWriter | None = None
        self._newest = 0
        self._leaving = 0
        """The last segment whose pages began to go down."""
        self._pending: list[Entry] = []
        self._index_bytes = 0
        self._is_closed = False
        self._workers = ThreadPoolExecutor(
            min(_MAX_WORKERS, os.cpu_count() or 1), thread_name_prefix="kvpaging-disk"
        )
        """Read and check pages. A thread that the medium holds is given up by who waits for it."""
        self._packers = ThreadPoolExecutor(
            min(_MAX_WORKERS, os.cpu_count() or 1),
            thread_name_prefix="kvpaging-pack",
            initializer=give_way,
        )
        """Compress pages for writing, which no request waits for."""
        try:
            self._lock_file = _lock_directory(directory)
            try:
                self._index = self._open_index()
                self._recover()
            except OSError:
                self._workers.shutdown()
                self._packers.shutdown()
                os.close(self._lock_file)
                raise
        except OSError as error:
            raise ConfigError(f"the disk cache {directory} can't be used: {error}") from error

    def contains(self, keys: Sequence[PageKey]) -> list[bool]:
        """Which pages are believed to be here; from memory, without a lock."""
        return [key in self._places for key in keys]

    def load(self, keys: Sequence[PageKey], deadline_s: float) -> list[StoredPage | None]:
        """Each page, whole and checked, or `None`. Pages that lie together are read together."""
        started = self._clock()
        found: list[StoredPage | None] = [None] * len(keys)
        runs = list(self._runs(keys))
        num_late = sum(len(run.wanted) for run in runs)
        for run, pages in self._ahead(self._workers, self._load_run, runs, started + deadline_s):
            num_late -= len(run.wanted)
            for (i, _, _), page in zip(run.wanted, pages, strict=True):
                found[i] = page
        hits = [page for page in found if page is not None]
        self._mark_used([page.key for page in hits])
        self._counters.add(
            loads=len(keys),
            hits=len(hits),
            late=num_late,
            loaded_payload_bytes=sum(len(page.payload) for page in hits),
            load_s=self._clock() - started,
        )
        return found

    def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
        """Append the pages that are not here, and let the oldest segments go for them."""
        started = self._clock()
        new = {page.key: page for page in pages if page.key not in self._places}
        known = [page.key for page in pages if page.key in self._places]
        self._mark_used(known)
        num_left = len(new)
        num_stored = 0
        for batch, values in self._packed(new.values(), started + deadline_s):
            with self._write_lock:
                taken = self._store_values([page.key for page in batch], values)
            num_left -= len(batch)
            num_stored += taken
            self._counters.add(
                stored=taken,
                refused=len(batch) - taken,
                stored_payload_bytes=sum(len(page.payload) for page in batch[:taken]),
                written_bytes=sum(value.num_bytes for value in values[:taken]),
            )
            if taken < len(batch):
                self._counters.add(refused=num_left)
                num_left = 0
                break
        self._counters.add(
            stores=len(pages), known=len(known), late=num_left, store_s=self._clock() - started
        )
        return len(known) + num_stored

    def clear(self) -> None:
        """Delete every segment. Raises `OSError` where some could not be."""
        with self._write_lock:
            self._seal()
            while self._segments and not self._is_closed:
                self._drop_oldest(EvictionCause.FLUSH)
            if self._num_bytes:
                raise OSError(f"{self._directory}: {self._num_bytes} bytes can't be deleted")

    def evicted(self, keys: Sequence[PageKey]) -> list[Evicted | None]:
        """How long ago and why each page left, since this was opened; of the last ones."""
        return self._evictions.ages(keys, self._clock())

    def stats(self) -> LevelStats:
        """State and totals."""
        return self._counters.stats(
            len(self._places), self._num_bytes + self._index_bytes, self._capacity_bytes
        )

    def close(self) -> None:
        """Seal, let go of the files and of the directory's lock. Idempotent."""
        with self._write_lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._seal()
            if self._index is not None:
                self._index.close()
            with self._places_lock:
                self._places.clear()
            self._workers.shutdown(wait=False, cancel_futures=True)
            self._packers.shutdown(wait=False, cancel_futures=True)
            os.close(self._lock_file)

    def _ahead(
        self,
        workers: ThreadPoolExecutor,
        work: Callable[[_Item], _Done],
        items: Iterable[_Item],
        end_s: float,
    ) -> Iterator[tuple[_Item, _Done]]:
        """Each item with what `work` makes of it, in order, some of them worked out ahead.

        Ends early at `end_s`, or when the level is closed.
        """
        under_way: deque[tuple[_Item, Future[_Done]]] = deque()
        rest = iter(items)
        try:
            while True:
                for item in itertools.islice(rest, _MAX_WORKERS + 1 - len(under_way)):
                    under_way.append((item, workers.submit(work, item)))
                if not under_way:
                    return
                item, future = under_way.popleft()
                left_s = end_s - self._clock()
                if left_s <= 0:
                    return
                yield item, future.result(left_s)
        except (TimeoutError, CancelledError, RuntimeError):  # late, or closed meanwhile
            return
        finally:
            for _, future in under_way:
                future.cancel()

    def _packed(
        self, pages: Iterable[StoredPage], end_s: float
    ) -> Iterator[tuple[list[StoredPage], list[_Value]]]:
        """Batches of pages and their values, until `end_s`."""
        batches = _batches(pages)
        if self._codec.compresses:
            yield from self._ahead(self._packers, self._encode, batches, end_s)
            return
        for batch in batches:  # nothing that would be worth another thread
            if self._clock() >= end_s:
                return
            yield batch, self._encode(batch)

    def _encode(self, pages: list[StoredPage]) -> list[_Value]:
        return [_Value(parts) for parts in self._codec.encode_many(pages)]

    # Opening.

    def _open_index(self) -> SegmentIndex | None:
        """The index; a new one where it is broken; none where there can't be one."""
        path = self._directory / _INDEX_NAME
        for _ in range(2):
            try:
                return SegmentIndex(path)
            except sqlite3.Error as error:
                self._failed("the index is broken and is made anew", error)
                SegmentIndex.remove(path)
        return None

    def _recover(self) -> None:
        """Find the pages: from the index where it knows, else from the segments themselves."""
        sizes = segment.sizes(self._directory)
        known = self._known_stretches(sizes)
        for segment_id, size in sizes.items():
            self._segments[segment_id] = _Segment(size)
            self._num_bytes += size
            self._newest = segment_id
            self._recover_segment(segment_id, size, known.get(segment_id, []))
        self._measure_index()
        while self._segments and not self._fits(0, 0):
            self._drop_oldest(EvictionCause.ROOM)
        newest = self._segments.get(self._newest)
        if newest is not None and newest.num_bytes < self._segment_bytes:
            path = segment.path_of(self._directory, self._newest)
            self._writer = SegmentWriter(path, newest.num_bytes)

    def _known_stretches(
        self, sizes: dict[int, int]
    ) -> dict[int, list[tuple[int, int, list[Entry]]]]:
        """The index's stretches of segments that are there and as long as it says, in order."""
        if self._index is None:
            return {}
        try:
            stretches = self._index.stretches()
            gone = {s.segment for s in stretches if s.end_byte > sizes.get(s.segment, -1)}
            self._index.forget(gone)
        except sqlite3.Error as error:
            self._failed("the index is broken and is made anew", error)
            self._index.close()
            SegmentIndex.remove(self._directory / _INDEX_NAME)
            self._index = self._open_index()
            return {}
        known: dict[int, list[tuple[int, int, list[Entry]]]] = {}
        for s in stretches:
            if s.segment not in gone:
                known.setdefault(s.segment, []).append((s.first_byte, s.end_byte, s.entries))
        return known

    def _recover_segment(
        self, segment_id: int, size: int, stretches: list[tuple[int, int, list[Entry]]]
    ) -> None:
        """Take over what is known of a segment, and scan the rest of it."""
        path = segment.path_of(self._directory, segment_id)
        end = 0
        for first_byte, end_byte, entries in [*stretches, (size, size, [])]:
            if end < first_byte:
                found = [e for e in segment.scan(path, end) if e.end <= first_byte]
                self._place(segment_id, found)
                scanned = found[-1].end if found else end
                self._add_to_index(segment_id, end, scanned, found)
                if scanned < first_byte:
                    self._torn(segment_id, scanned, first_byte, is_end=first_byte == size)
            if end <= first_byte:
                self._place(segment_id, entries)
                end = end_byte

    def _torn(self, segment_id: int, offset: int, end: int, *, is_end: bool) -> None:
        """A stretch holds no whole value: cut off where it ends the newest segment."""
        self._counters.add(corrupt=1)
        self._complaints.warn(
            "torn or broken pages are skipped", f"segment {segment_id}, bytes {offset} to {end}"
        )
        if is_end:
            with self._complaining("cutting off"):
                os.truncate(segment.path_of(self._directory, segment_id), offset)
                self._segments[segment_id].num_bytes -= end - offset
                self._num_bytes -= end - offset

    # Reading.

    def _runs(self, keys: Sequence[PageKey]) -> Iterator[_Run]:
        """The pages that are here, neighbours together, in the order of `keys`."""
        run: _Run | None = None
        for i, key in enumerate(keys):
            place = self._places.get(key)
            if place is None:
                continue
            segment_id, offset, num_bytes = place
            if (
                run is not None
                and (segment_id, offset) == (run.segment, run.end)
                and run.num_bytes + num_bytes <= _MOVE_BYTES
            ):
                run.num_bytes += num_bytes
                run.wanted.append((i, key, place))
                continue
            if run is not None:
                yield run
            run = _Run(segment_id, offset, num_bytes, [(i, key, place)])
        if run is not None:
            yield run

    def _load_run(self, run: _Run) -> list[StoredPage | None]:
        """The run's pages, read and checked."""
        path = segment.path_of(self._directory, run.segment)
        try:
            data = segment.read(path, run.offset, run.num_bytes)
        except OSError as error:
            if run.segment in self._segments:  # else it went meanwhile: a plain miss
                self._failed("a segment can't be read", error)
            return [None] * len(run.wanted)
        values = [(data[place[1] - run.offset :][: place[2]], key) for _, key, place in run.wanted]
        pages: list[StoredPage | None] = []
        for page, (_, key, place) in zip(self._codec.decode_many(values), run.wanted, strict=True):
            if isinstance(page, BadValue):
                self._counters.add(corrupt=1)
                self._complaints.warn("a page is corrupt", f"{path} at {place[1]}: {page}")
                self._forget([(key, place)], EvictionCause.CORRUPT)
                pages.append(None)
                continue
            pages.append(page)
        return pages

    def _mark_used(self, keys: Iterable[PageKey]) -> None:
        with self._places_lock:
            self._used.update(key for key in keys if key in self._places)

    def _forget(self, pages: Iterable[tuple[PageKey, _Place]], cause: EvictionCause) -> None:
        """These are here no longer, those excepted that lie elsewhere by now."""
        with self._places_lock:
            self._evictions.now_s = self._clock()
            for key, place in pages:
                if self._places.get(key) == place:
                    del self._places[key]
                    self._used.discard(key)
                    self._evictions.add(key, cause)

    # Writing. The caller holds the write lock.

    def _store_values(self, keys: list[PageKey], values: list[_Value]) -> int:
        """Append these values and make room for them; returns how many, from the first on."""
        done = 0
        try:
            while done < len(values) and not self._is_closed:
                size = values[done].num_bytes
                rest = sum(value.num_bytes for value in values[done:])
                wanted = max(size, min(rest, self._segment_bytes))
                if not self._make_room(wanted, len(values) - done):
                    self._complaints.warn("no room for a page", f"of {size} bytes")
                    break
                done += self._append(keys[done:], values[done:])
        except OSError as error:
            self._failed("a page can't be written", error)
        self._let_go_ahead()
        return done

    def _let_go_ahead(self) -> None:
        """Where the next segment may need the oldest one's room, its pages begin to go down."""
        oldest = next(iter(self._segments), self._newest)
        if (
            self._overflow is None
            or oldest in (self._leaving, self._newest)
            or self._fits(2 * self._segment_bytes, _ENTRIES_A_STRETCH)
        ):
            return
        self._leaving = oldest
        keys = list(dict.fromkeys(self._segments[oldest].keys))
        self._overflow.pull(self._leave(oldest, keys, self._overflow))

    def _leave(
        self, segment_id: int, keys: list[PageKey], overflow: Overflow
    ) -> Iterator[list[StoredPage]]:
        """The pages of a segment, as long as it is there. Runs in the overflow's thread."""
        num_left = len(keys)
        for run in self._runs(keys):
            if run.segment == segment_id:
                try:
                    data = segment.read(
                        segment.path_of(self._directory, segment_id), run.offset, run.num_bytes
                    )
                except OSError:  # its room was needed
                    break
                yield list(self._whole_pages(run, data))
            num_left -= len(run.wanted)
        overflow.dropped(num_left)

    def _whole_pages(self, run: _Run, data: memoryview) -> Iterator[StoredPage]:
        """The run's pages that are whole and of this root; others are no use to anybody."""
        for _, key, place in run.wanted:
            at = place[1] - run.offset
            with suppress(BadValue):
                yield self._codec.decode(data[at : at + place[2]], key)

    def _make_room(self, num_bytes: int, num_entries: int) -> bool:
        """Let the oldest segments go until so much fits, and the reserve for used pages too."""
        while not self._fits(num_bytes + self._segment_bytes // 2, num_entries):
            if len(self._segments) <= (self._writer is not None):
                return False
            self._drop_oldest(EvictionCause.ROOM, keep_used=True)
        return True

    def _fits(self, num_bytes: int, num_entries: int) -> bool:
        """Whether so much more fits, with what indexing it may take."""
        wanted = num_bytes + SegmentIndex.growth_bytes(len(self._pending) + num_entries)
        return self._num_bytes + self._index_bytes + wanted <= self._capacity_bytes

    def _append(self, keys: Sequence[PageKey], values: Sequence[_Value]) -> int:
        """Write the values that one segment takes, at least the first; returns how many.

        Raises OSError when none could be written.
        """
        writer = self._writer
        if writer is None or (
            writer.end and writer.end + values[0].num_bytes > self._segment_bytes
        ):
            writer = self._begin_segment()
        entries: list[Entry] = []
        end = writer.end
        for key, value in zip(keys, values, strict=True):
            if entries and end + value.num_bytes > self._segment_bytes:
                break
            entries.append(Entry(key, end, value.num_bytes))
            end += value.num_bytes
        writer.append([piece for value in values[: len(entries)] for piece in value.pieces])
        self._num_bytes += writer.end - entries[0].offset
        self._segments[self._newest].num_bytes = writer.end
        self._place(self._newest, entries)
        self._pending += entries
        if len(self._pending) >= _ENTRIES_A_STRETCH:
            self._index_pending()
        return len(entries)

    def _begin_segment(self) -> SegmentWriter:
        self._seal()
        newest = self._newest + 1
        self._writer = SegmentWriter(segment.path_of(self._directory, newest))
        self._newest = newest
        self._segments[newest] = _Segment()
        return self._writer

    def _seal(self) -> None:
        """The newest segment is written no more."""
        self._index_pending()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _place(self, segment_id: int, entries: Iterable[Entry]) -> None:
        with self._places_lock:
            for entry in entries:
                self._places[entry.key] = (segment_id, entry.offset, entry.num_bytes)
                self._segments[segment_id].keys.append(entry.key)

    def _drop_oldest(self, cause: EvictionCause, *, keep_used: bool = False) -> None:
        """Delete the oldest segment, or keep what was used of it. Frees half of it or more."""
        segment_id, oldest = next(iter(self._segments.items()))
        here = [
            (key, place)
            for key in dict.fromkeys(oldest.keys)
            if (place := self._places.get(key)) is not None and place[0] == segment_id
        ]
        rescued = self._rescue(here) if keep_used else 0
        self._forget(here, cause)
        if self._overflow is not None and cause is EvictionCause.ROOM:
            is_leaving = segment_id <= self._leaving
            self._overflow.dropped(0 if is_leaving else len(here) - rescued)
        del self._segments[segment_id]
        with self._complaining("a segment can't be deleted"):
            segment.path_of(self._directory, segment_id).unlink(missing_ok=True)
            self._num_bytes -= oldest.num_bytes
        with self._complaining("indexing"):
            if self._index is not None:
                self._index.forget([segment_id])
        self._measure_index()
        self._counters.add(evicted=len(here) - rescued, rescued=rescued)

    def _rescue(self, pages: list[tuple[PageKey, _Place]]) -> int:
        """Append those of these pages again that were used, as far as the reserve goes; how many.

        They must be used again to be kept again.
        """
        rescued = 0
        with self._complaining("keeping used pages"):
            for key, (segment_id, offset, num_bytes) in pages:
                if key not in self._used:
                    continue
                if not self._fits(num_bytes, 1):
                    break
                path = segment.path_of(self._directory, segment_id)
                value = segment.read(path, offset, num_bytes)
                try:
                    self._codec.check(value, key)
                except BadValue:
                    self._counters.add(corrupt=1)
                    continue
                self._append([key], [_Value([value])])
                with self._places_lock:
                    self._used.discard(key)
                rescued += 1
        return rescued

    # The index.

    def _index_pending(self) -> None:
        if self._pending:
            end = self._pending[-1].end
            self._add_to_index(self._newest, self._pending[0].offset, end, self._pending)
            self._pending = []
            self._measure_index()

    def _add_to_index(
        self, segment_id: int, first_byte: int, end_byte: int, entries: Sequence[Entry]
    ) -> None:
        if entries and self._index is not None:
            with self._complaining("indexing"):
                self._index.add(segment_id, first_byte, end_byte, entries)

    def _measure_index(self) -> None:
        with self._complaining("measuring the index"):
            if self._index is not None:
                self._index_bytes = self._index.num_bytes

    # Trouble.

    @contextmanager
    def _complaining(self, what: str) -> Iterator[None]:
        """What fails in here is counted and logged, and the level goes on without it."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            self._failed(what, error)

    def _failed(self, what: str, error: Exception) -> None:
        self._counters.add(failures=1)
        self._complaints.warn(what, f"{self._directory}: {error}")


def _batches(pages: Iterable[StoredPage]) -> Iterator[list[StoredPage]]:
    """Pages in groups of about `_MOVE_BYTES`."""
    batch: list[StoredPage] = []
    num_bytes = 0
    for page in pages:
        batch.append(page)
        num_bytes += len(page.payload)
        if num_bytes >= _MOVE_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def kept_secret(directory: Path) -> bytes:
    """The secret that lies with a disk cache's pages, made at the first call. Raises ConfigError.

    For what needs one that lives as long as the pages do, where nobody gave another.
    """
    path = directory / _SECRET_NAME
    try:
        _own_directory(directory)
        with suppress(FileExistsError):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.write(file, secrets.token_hex(32).encode())
            finally:
                os.close(file)
    except OSError as error:
        raise ConfigError(f"the disk cache {directory} can't be used: {error}") from error
    return read_secret(path)


def _own_directory(directory: Path) -> None:
    """Make the directory, for us alone. Raises ConfigError and OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.geteuid():
        raise ConfigError(f"the disk cache {directory} belongs to another user")
    names = {path.name for path in directory.iterdir()}
    if _LOCK_NAME not in names and names - {_SECRET_NAME}:
        raise ConfigError(
            f"{directory} holds other files; give the disk cache a directory of its own"
        )
    if stat.S_IMODE(found.st_mode) != 0o700:
        directory.chmod(0o700)


def _lock_directory(directory: Path) -> int:
    """Make the directory ours alone; returns the lock's file. Raises ConfigError and OSError."""
    _own_directory(directory)
    file = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise ConfigError(
            f"another server uses the disk cache {directory}; give each server its own directory"
        ) from None
    return file
