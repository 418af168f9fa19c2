"""Pages on a disk: a log of segments, an index beside it, one bound in bytes over all of it.

Pages are appended to the newest segment, and leave in the order of `chain_order`, whatever segment
they lie in. Their room is had back a segment at a time: the one with the least left in it goes, and
what is left, half a segment at most, is appended again. Corrupt pages leave with their segment.
What is next to leave goes on its way to the next level, if there is one, before its room is needed:
nobody waits for that, and it takes no room and no more memory than a batch.

A process that is killed at any moment, a full disk and flipped bits cost misses, never a wrong
page: a page counts when it is whole behind its header, and every read checks its digest. The end of
the machine may cost what the system had not written back yet.

Where each page lies is kept in memory (some 400 bytes a page), so that `contains` touches no disk.
Knows nothing of the tokens' meaning or of who uses the pages.
"""

from __future__ import annotations

import errno
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
from kvpaging.base.secret_file import MIN_SECRET_BYTES, read_secret
from kvpaging.base.threads import give_way
from kvpaging.levels import segment
from kvpaging.levels.chain_order import ChainOrder
from kvpaging.levels.codec import HEADER_BYTES, BadValue, OtherRoot, PageCodec, read_header
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
_PATIENCE_S: Final = 2.0
"""How long emptying and closing wait for a write that the medium holds."""
_MOST_FILLED: Final = 0.5
"""Of a segment whose room is had back: its rest is written again, and room must be gained."""
_MAX_OTHER_ROOTS: Final = 4
_INDEX_NAME: Final = "index.sqlite"
_LOCK_NAME: Final = "lock"
_SECRET_NAME: Final = "secret"
_SECRET_DRAFT_NAME: Final = "secret.new"

_logger: Final = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Done = TypeVar("_Done")


_Place = tuple[int, int, int]
"""Segment, offset, bytes. A plain tuple: the garbage collector need not look at a million."""


class _Value:
    """One page's value in pieces."""

    __slots__ = ("key", "num_bytes", "parent", "pieces")

    def __init__(self, key: PageKey, parent: PageKey, pieces: list[bytes | memoryview]) -> None:
        self.key = key
        self.parent = parent
        self.pieces = pieces
        self.num_bytes = sum(map(len, pieces))


@dataclass(slots=True)
class _Segment:
    num_bytes: int = 0
    live_bytes: int = 0
    """Of pages that are found here."""
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
        self._complaints = Complaints(_logger, clock)
        self._places: dict[PageKey, _Place] = {}
        self._order = ChainOrder()
        """The keys of `_places`, and of the pages that are being written."""
        self._leaving: dict[PageKey, int] = {}
        """Bytes of pages that began to go down, and are next to leave."""
        self._leaving_bytes = 0
        self._largest_store_bytes = 0
        """Of the payloads of one call."""
        self._places_lock = threading.Lock()
        """For changes to those above; held for moments. Looking a page up needs no lock."""
        self._store_lock = threading.Lock()
        """For one store after the other; taken before those below."""
        self._write_lock = threading.Lock()
        """For everything below; held while writing."""
        self._segments: dict[int, _Segment] = {}
        self._num_bytes = 0
        self._writer: SegmentWriter | None = None
        self._newest = 0
        self._live_bytes = 0
        """Of pages that are found; the rest of the segments is room to be had back."""
        self._most_bytes = capacity_bytes
        """What the files may come to while pages are appended again."""
        self._pending: list[Entry] = []
        self._index_bytes = 0
        self._roots: dict[bytes, None] = {}
        """Of the pages that were here at opening, the latest last."""
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
        self.touch([page.key for page in hits])
        self._counters.add(
            loads=len(keys),
            hits=len(hits),
            late=num_late,
            loaded_payload_bytes=sum(len(page.payload) for page in hits),
            load_s=self._clock() - started,
        )
        return found

    def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
        """Append the pages that are not here, and let those go for them that were used least.

        They take their place in the order first: what would have to leave for them counts for less
        than they do, or they find no room.
        """
        started = self._clock()
        with self._store_lock:
            with self._places_lock:
                self._stay(self._order.add((page.key, page.parent) for page in pages))
                known = {page.key for page in pages if page.key in self._places}
                coming = (p for p in pages if p.key not in known and p.key in self._order)
                new = {page.key: page for page in coming}
            try:
                num_stored, num_late = self._store_new(new, started + deadline_s)
            finally:
                with self._places_lock:
                    for key in new.keys() - self._places.keys():
                        self._order.remove(key)
        self._counters.add(
            stores=len(pages),
            known=len(known),
            refused=len(pages) - len(known) - num_stored - num_late,
            late=num_late,
            store_s=self._clock() - started,
        )
        return len(known) + num_stored

    def _store_new(self, new: dict[PageKey, StoredPage], end_s: float) -> tuple[int, int]:
        """Returns how many of these are stored, and how many were not come to until `end_s`."""
        num_bytes = sum(len(page.payload) for page in new.values())
        self._largest_store_bytes = max(num_bytes, self._largest_store_bytes)
        num_left, num_stored = len(new), 0
        for batch, values in self._packed(new.values(), end_s):
            with self._write_lock:
                stored = self._store_values(values)
                self._let_go_ahead()
            num_left -= len(batch)
            num_stored += len(stored)
            self._counters.add(
                stored=len(stored),
                stored_payload_bytes=sum(len(new[value.key].payload) for value in stored),
                written_bytes=sum(value.num_bytes for value in stored),
            )
            if len(stored) < len(batch):
                with self._places_lock:
                    for page in new.values():
                        if self._order.was_refused(page.parent):
                            self._order.refuse(page.key)
                return num_stored, 0
        return num_stored, num_left

    def touch(self, keys: Sequence[PageKey]) -> list[bool]:
        """These pages are used; which of them are here, or found no room lately."""
        with self._places_lock:
            self._stay(self._order.use(keys))
            return [key in self._places or self._order.was_refused(key) for key in keys]

    def _stay(self, keys: Iterable[PageKey]) -> None:
        """These are not next to leave any more. The caller holds the places' lock."""
        if self._leaving:
            for key in keys:
                self._leaving_bytes -= self._leaving.pop(key, 0)

    def clear(self) -> None:
        """Delete every segment.

        Raises `OSError` where some could not be, or where a write holds them up for too long.
        """
        if not self._write_lock.acquire(timeout=_PATIENCE_S):
            raise TimeoutError(f"{self._directory}: a write has not ended within {_PATIENCE_S} s")
        try:
            self._seal()
            while self._segments and not self._is_closed:
                self._drop(next(iter(self._segments)), EvictionCause.FLUSH)
            if self._num_bytes:
                raise OSError(f"{self._directory}: {self._num_bytes} bytes can't be deleted")
            segment.sync(self._directory)  # or a machine that fails now would bring them back
        finally:
            self._write_lock.release()

    def evicted(self, keys: Sequence[PageKey]) -> list[Evicted | None]:
        """How long ago and why each page left, since this was opened; of the last ones."""
        return self._evictions.ages(keys, self._clock())

    def stats(self) -> LevelStats:
        """State and totals."""
        return self._counters.stats(
            len(self._places),
            self._num_bytes + self._index_bytes,
            self._capacity_bytes,
            self._evictions.counts,
        )

    def close(self) -> None:
        """Seal, let go of the files and of the directory's lock. Idempotent.

        Where the medium holds a write, the files stay open until the process ends.
        """
        if not self._write_lock.acquire(timeout=_PATIENCE_S):
            self._complaints.warn("a disk cache is left as it is", "a write to it does not end")
            self._end()
            return
        try:
            if self._is_closed:
                return
            self._seal()
            if self._index is not None:
                self._index.close()
            self._end()
            os.close(self._lock_file)
        finally:
            self._write_lock.release()

    def _end(self) -> None:
        """From now on everything is a miss."""
        self._is_closed = True
        with self._places_lock:
            self._places.clear()
            self._order.clear()
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._packers.shutdown(wait=False, cancel_futures=True)

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
        encoded = zip(pages, self._codec.encode_many(pages), strict=True)
        return [_Value(page.key, page.parent, parts) for page, parts in encoded]

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
        found: list[tuple[PageKey, PageKey]] = []
        for segment_id, size in sizes.items():
            self._segments[segment_id] = _Segment(size)
            self._num_bytes += size
            self._newest = segment_id
            for entries in self._recovered(segment_id, size, known.get(segment_id, [])):
                self._place(segment_id, entries)
                self._note_root(segment_id, entries)
                found += [(entry.key, entry.parent) for entry in entries]
        self._measure_index()
        self._recover_order(found)
        if not self._fits(0, 0):  # the bound is a smaller one now
            self._most_bytes = self._bytes_with(self._segment_bytes, _ENTRIES_A_STRETCH)
            self._make_room(0, 0)
            self._most_bytes = self._capacity_bytes
        newest = self._segments.get(self._newest)
        if self._writer is None and newest is not None and newest.num_bytes < self._segment_bytes:
            path = segment.path_of(self._directory, self._newest)
            self._writer = SegmentWriter(path, newest.num_bytes)

    def _recover_order(self, found: list[tuple[PageKey, PageKey]]) -> None:
        """What lies behind was written later. Pages whose head is gone leave before all others."""
        self._order.add(reversed(found))
        whole: dict[PageKey, None] = {PageKey(self._codec.root): None}
        for key in reversed(self._order):
            if self._order.parent(key) in whole:
                whole[key] = None
        self._order.use(whole)

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

    def _recovered(
        self, segment_id: int, size: int, stretches: list[tuple[int, int, list[Entry]]]
    ) -> Iterator[list[Entry]]:
        """What lies in a segment: what is known of it, and the rest by scanning."""
        path = segment.path_of(self._directory, segment_id)
        end = 0
        for first_byte, end_byte, entries in [*stretches, (size, size, [])]:
            if end < first_byte:
                found = [e for e in segment.scan(path, end) if e.end <= first_byte]
                yield found
                scanned = found[-1].end if found else end
                self._add_to_index(segment_id, end, scanned, found)
                if scanned < first_byte:
                    self._torn(segment_id, scanned, first_byte, is_end=first_byte == size)
            if end <= first_byte:
                yield entries
                end = end_byte

    def _note_root(self, segment_id: int, stretch: Sequence[Entry]) -> None:
        """One server wrote this stretch: the first page says under which root."""
        if stretch:
            path = segment.path_of(self._directory, segment_id)
            with suppress(OSError, BadValue):
                header = read_header(segment.read(path, stretch[0].offset, HEADER_BYTES))
                self._roots.pop(header.root, None)
                self._roots[header.root] = None

    @property
    def other_roots(self) -> tuple[PageKey, ...]:
        """Of other numerics identities, whose pages were here at opening: the last ones."""
        others = [PageKey(root) for root in self._roots if root != self._codec.root]
        return tuple(others[: -_MAX_OTHER_ROOTS - 1 : -1])

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

    def _forget(self, pages: Iterable[tuple[PageKey, _Place]], cause: EvictionCause) -> None:
        """These are here no longer, those excepted that lie elsewhere by now."""
        with self._places_lock:
            self._forget_locked(pages, cause)

    def _forget_locked(self, pages: Iterable[tuple[PageKey, _Place]], cause: EvictionCause) -> None:
        self._evictions.now_s = self._clock()
        for key, place in pages:
            if self._places.get(key) == place:
                del self._places[key]
                self._order.remove(key)
                self._leaving_bytes -= self._leaving.pop(key, 0)
                self._count_live(place[0], -place[2])
                self._evictions.add(key, cause)

    # Writing. The caller holds the write lock.

    def _store_values(self, values: list[_Value]) -> list[_Value]:
        """Append these values and make room for them; returns those that were."""
        stored: list[_Value] = []
        left = values
        try:
            while left and not self._is_closed:
                size = left[0].num_bytes
                wanted = max(size, min(sum(v.num_bytes for v in left), self._segment_bytes))
                if self._make_room(wanted, len(left)) or self._make_room(size, len(left)):
                    count = self._append(left)
                    stored += left[:count]
                    left = left[count:]
                    continue
                self._complaints.warn("no room for a page", f"of {size} bytes")
                with self._places_lock:
                    for value in left:
                        self._order.refuse(value.key)
                break
        except OSError as error:
            self._failed("a page can't be written", error)
        return stored

    def _let_go_ahead(self) -> None:
        """Where room may be needed soon, what is next to leave goes down.

        At least what the next store may push out: a segment's bytes, or those of the largest store.
        """
        ahead = 2 * max(self._segment_bytes, self._largest_store_bytes)
        if self._overflow is None or self._fits(ahead, _ENTRIES_A_STRETCH):
            return
        keys = []
        with self._places_lock:
            if self._leaving_bytes > ahead // 2:
                return
            for key in self._order:
                place = self._places.get(key)
                if self._leaving_bytes >= ahead or place is None:
                    break
                if key not in self._leaving:
                    keys.append(key)
                    self._leaving[key] = place[2]
                    self._leaving_bytes += place[2]
            keys.sort(key=self._places.__getitem__)
        self._overflow.pull(self._leave(keys, self._overflow))

    def _leave(self, keys: list[PageKey], overflow: Overflow) -> Iterator[list[StoredPage]]:
        """These pages, as long as they are there. Runs in the overflow's thread."""
        num_left = len(keys)
        for run in self._runs(keys):
            path = segment.path_of(self._directory, run.segment)
            try:
                data = segment.read(path, run.offset, run.num_bytes)
            except OSError:  # its room was needed
                continue
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
        """Let pages go until so much fits, and the reserve for what is appended again too."""
        while not self._fits(num_bytes + self._segment_bytes // 2, num_entries):
            segment_id = self._emptied()
            if segment_id is None:
                return False
            self._drop(segment_id, EvictionCause.ROOM)
        return True

    def _emptied(self) -> int | None:
        """The sealed segment with the least left in it, after letting pages go; `None`: none may.

        Pages leave until one is empty, or until as many bytes are left behind as a segment has, in
        a segment that is half empty at least. So what is appended again is at most what is had
        back, and nothing where pages leave in the order in which they came.
        """
        least = self._least_filled()
        num_dropped = 0
        while (
            least is None
            or least[0] > _MOST_FILLED
            or (least[0] > 0 and self._num_bytes - self._live_bytes < self._segment_bytes)
        ):
            with self._places_lock:
                key = self._order.first
                place = None if key is None else self._places.get(key)
                if key is None or place is None:  # all that is left counts for more than what comes
                    break
                num_dropped += self._overflow is not None and key not in self._leaving
                self._forget_locked([(key, place)], EvictionCause.ROOM)
            if place[0] != self._newest or self._writer is None:
                filled = (self._filled(place[0]), place[0])
                least = filled if least is None else min(least, filled)
        if self._overflow is not None:
            self._overflow.dropped(num_dropped)
        if least is not None and least[0] <= _MOST_FILLED:
            return least[1]
        if (
            self._writer is None
            or self._writer.end == 0
            or self._filled(self._newest) > _MOST_FILLED
        ):
            return None
        self._seal()
        return self._newest

    def _least_filled(self) -> tuple[float, int] | None:
        """The share that is left in a sealed segment, and which one; the oldest of equals."""
        sealed = (i for i in self._segments if i != self._newest or self._writer is None)
        return min(((self._filled(i), i) for i in sealed), default=None)

    def _filled(self, segment_id: int) -> float:
        """The share of a segment's bytes whose pages are found."""
        each = self._segments[segment_id]
        return each.live_bytes / each.num_bytes if each.num_bytes else 0.0

    def _fits(self, num_bytes: int, num_entries: int) -> bool:
        """Whether so much more fits, with what indexing it may take."""
        return self._bytes_with(num_bytes, num_entries) <= self._capacity_bytes

    def _bytes_with(self, num_bytes: int, num_entries: int) -> int:
        """What the files come to with so much more, at most."""
        wanted = num_bytes + SegmentIndex.growth_bytes(len(self._pending) + num_entries)
        return self._num_bytes + self._index_bytes + wanted

    def _append(self, values: Sequence[_Value]) -> int:
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
        for value in values:
            if entries and end + value.num_bytes > self._segment_bytes:
                break
            entries.append(Entry(value.key, value.parent, end, value.num_bytes))
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
        here = self._segments[segment_id]
        with self._places_lock:
            for entry in entries:
                before = self._places.get(entry.key)
                if before is not None:
                    self._count_live(before[0], -before[2])
                self._places[entry.key] = (segment_id, entry.offset, entry.num_bytes)
                self._count_live(segment_id, entry.num_bytes)
                here.keys.append(entry.key)

    def _count_live(self, segment_id: int, num_bytes: int) -> None:
        self._segments[segment_id].live_bytes += num_bytes
        self._live_bytes += num_bytes

    def _drop(self, segment_id: int, cause: EvictionCause) -> None:
        """Delete a segment. For want of room, what is left in it is appended again."""
        dropped = self._segments[segment_id]
        here = [
            (key, place)
            for key in dict.fromkeys(dropped.keys)
            if (place := self._places.get(key)) is not None and place[0] == segment_id
        ]
        rescued = self._rescue(here) if cause is EvictionCause.ROOM else 0
        if self._overflow is not None and cause is EvictionCause.ROOM:
            # What is leaving already is counted where it goes.
            lost = (key for key, place in here if self._places.get(key) == place)
            self._overflow.dropped(sum(key not in self._leaving for key in lost))
        self._forget(here, cause)
        del self._segments[segment_id]
        with self._complaining("a segment can't be deleted"):
            segment.path_of(self._directory, segment_id).unlink(missing_ok=True)
            self._num_bytes -= dropped.num_bytes
        with self._complaining("indexing"):
            if self._index is not None:
                self._index.forget([segment_id])
        self._measure_index()
        self._counters.add(rescued=rescued)

    def _rescue(self, pages: list[tuple[PageKey, _Place]]) -> int:
        """Append these pages again, as far as there is room; how many."""
        rescued = 0
        with self._complaining("keeping pages"):
            for key, (segment_id, offset, num_bytes) in pages:
                if self._bytes_with(num_bytes, 1) > self._most_bytes:
                    break
                path = segment.path_of(self._directory, segment_id)
                value = segment.read(path, offset, num_bytes)
                try:
                    self._codec.check(value, key)
                except OtherRoot:
                    continue
                except BadValue:
                    self._counters.add(corrupt=1)
                    self._forget([(key, (segment_id, offset, num_bytes))], EvictionCause.CORRUPT)
                    continue
                self._append([_Value(key, self._order.parent(key), [value])])
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

    For what needs one that lives as long as the pages do, where nobody gave another. It is there as
    a whole or not at all. A file that is too short to be one, as a crash or a full disk could leave
    it, was of use to nobody, and a new one takes its place; any other is never changed.
    """
    path = directory / _SECRET_NAME
    try:
        _own_directory(directory)
        num_bytes = path.stat().st_size if path.exists() else None
        if num_bytes is None:
            _make_secret(directory, os.link)
        elif num_bytes < MIN_SECRET_BYTES and len(path.read_bytes()) < MIN_SECRET_BYTES:
            _logger.warning("%s has %d bytes, no secret: it is made anew", path, num_bytes)
            _make_secret(directory, os.replace)
    except OSError as error:
        raise ConfigError(f"the disk cache {directory} can't be used: {error}") from error
    return read_secret(path)


def _make_secret(directory: Path, put: Callable[[Path, Path], None]) -> None:
    """Write a new secret and have the medium hold it, then `put` it in its place.

    `os.link` leaves one that another made meanwhile. Raises OSError.
    """
    draft = directory / _SECRET_DRAFT_NAME
    draft.unlink(missing_ok=True)
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        secret = secrets.token_hex(32).encode()
        if os.write(file, secret) < len(secret):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft))
        os.fsync(file)
    finally:
        os.close(file)
    with suppress(FileExistsError):
        put(draft, directory / _SECRET_NAME)
    draft.unlink(missing_ok=True)
    segment.sync(directory)


def _own_directory(directory: Path) -> None:
    """Make the directory, for us alone. Raises ConfigError and OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.geteuid():
        raise ConfigError(f"the disk cache {directory} belongs to another user")
    names = {path.name for path in directory.iterdir()}
    if _LOCK_NAME not in names and names - {_SECRET_NAME, _SECRET_DRAFT_NAME}:
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
