"""The disk level: what survives, what is never believed, and that the bound holds."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from level_pages import ROOT, key_of, page_of

from kvpaging.base.errors import ConfigError
from kvpaging.base.evictions import Evicted, EvictionCause
from kvpaging.base.ids import PageKey
from kvpaging.levels.codec import OVERHEAD_BYTES
from kvpaging.levels.disk import MIN_CAPACITY_BYTES, DiskLevel, kept_secret

PAYLOAD = 90
VALUE_BYTES = OVERHEAD_BYTES + 16 + PAYLOAD  # not compressed


def opened(directory: Path, capacity: int = MIN_CAPACITY_BYTES, **options: object) -> DiskLevel:
    settings = {"root": ROOT, "item_bytes": 2, "compress": False, **options}
    return DiskLevel(directory, capacity, **settings)  # type: ignore[arg-type]


def fill(level: DiskLevel, numbers: range, payload: int = PAYLOAD) -> None:
    for number in numbers:
        assert level.store([page_of(number, payload)], 60.0) == 1


def whole(level: DiskLevel, numbers: range, payload: int = PAYLOAD) -> set[int]:
    """The pages that the level answers; each must be right."""
    answers = level.load([key_of(n) for n in numbers], 60.0)
    for number, page in zip(numbers, answers, strict=True):
        assert page is None or page == page_of(number, payload)
    return {n for n, page in zip(numbers, answers, strict=True) if page is not None}


def num_bytes(directory: Path) -> int:
    total = 0
    for path in directory.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # it left meanwhile
            continue
    return total


def num_bytes_at_once(directory: Path) -> int:
    """Of a directory that others write to: 0 where it changed while it was looked at."""

    def sizes() -> dict[str, int]:
        return {path.name: path.stat().st_size for path in directory.iterdir()}

    try:
        before = sizes()
        return sum(before.values()) if sizes() == before else 0
    except FileNotFoundError:
        return 0


def index_of(directory: Path) -> Path:
    return directory / "index.sqlite"


def segments_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.pages"))


def crashed(directory: Path, to: Path) -> Path:
    """What a process that is killed now leaves behind."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(directory, to)
    return to


def test_comes_back_after_a_restart(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    level = opened(directory, segment_bytes=1000, compress=True)
    fill(level, range(20))
    assert whole(level, range(25)) == set(range(20))
    level.close()
    level = opened(directory)
    assert level.contains([key_of(n) for n in range(25)]) == [n < 20 for n in range(25)]
    assert whole(level, range(25)) == set(range(20))
    stats = level.stats()
    assert (stats.num_pages, stats.hits, stats.corrupt, stats.failures) == (20, 20, 0, 0)
    level.close()
    assert whole(level, range(20)) == set()
    assert level.store([page_of(1)], 1.0) == 0


def test_is_for_the_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    level = opened(directory)
    fill(level, range(3))
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    level.close()
    directory.chmod(0o755)
    opened(directory).close()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_is_locked_against_a_second_server(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache")
    with pytest.raises(ConfigError, match="another server"):
        opened(tmp_path / "cache")
    level.close()
    opened(tmp_path / "cache").close()


def test_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="other files"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match="can't be used"):
        opened(tmp_path / "letter.txt")
    with pytest.raises(ConfigError, match="at least"):
        opened(tmp_path / "cache", 1000)


def test_a_secret_may_lie_there_before_the_first_page(tmp_path: Path) -> None:
    secret = kept_secret(tmp_path / "cache")
    level = opened(tmp_path / "cache")
    fill(level, range(3))
    level.clear()
    level.close()
    assert kept_secret(tmp_path / "cache") == secret


@pytest.mark.parametrize("left", [b"", b"0123456789abcde"])
def test_a_secret_that_a_crash_cut_off_is_made_anew(tmp_path: Path, left: bytes) -> None:
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    (directory / "secret").write_bytes(left)
    (directory / "secret.new").write_bytes(b"torn")
    secret = kept_secret(directory)
    assert len(secret) == 64
    assert kept_secret(directory) == secret
    assert sorted(path.name for path in directory.iterdir()) == ["secret"]
    assert stat.S_IMODE((directory / "secret").stat().st_mode) == 0o600


def test_a_secret_that_may_be_in_use_is_never_changed(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    (directory / "secret").write_bytes(b"0123456789abcdef")
    assert kept_secret(directory) == b"0123456789abcdef"


def test_a_full_disk_at_the_first_start_leaves_no_part_of_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "cache"
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:20]))
        with pytest.raises(ConfigError, match="No space left"):
            kept_secret(directory)
    assert not (directory / "secret").exists()
    assert len(kept_secret(directory)) == 64


def test_another_root_is_never_answered(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache")
    fill(level, range(3))
    level.close()
    level = opened(tmp_path / "cache", root=b"other weights".ljust(32))
    assert whole(level, range(3)) == set()
    level.close()


def test_a_known_page_is_not_written_again(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache")
    fill(level, range(3))
    before = segments_of(tmp_path / "cache")[0].stat().st_size
    assert level.store([page_of(n, PAYLOAD) for n in (1, 2, 3, 3)], 60.0) == 3
    assert segments_of(tmp_path / "cache")[0].stat().st_size == before + VALUE_BYTES
    assert (level.stats().known, level.stats().stored) == (2, 4)
    level.close()


def test_nothing_is_done_after_the_deadline(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache")
    fill(level, range(3))
    assert level.load([key_of(0)], 0.0) == [None]
    assert level.store([page_of(9)], 0.0) == 0
    assert level.stats().late == 2
    level.close()


def test_what_arrived_in_time_is_kept(tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    level = opened(tmp_path / "cache", clock=clock)
    level.store([page_of(n, PAYLOAD) for n in range(10)], 60.0)
    keys = [key_of(n) for n in (0, 2, 4, 6, 8)]  # five reads, for they are no neighbours
    answers = level.load(keys, 3.5)
    assert [page is not None for page in answers] == [True, True, True, False, False]
    assert level.stats().late == 2
    level.close()


# Room.


def test_the_bound_holds_at_all_times(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    level = opened(directory, segment_bytes=100_000)
    largest = 0
    is_over = threading.Event()

    def watch() -> None:
        nonlocal largest
        while not is_over.is_set():
            largest = max(largest, num_bytes_at_once(directory))

    watcher = threading.Thread(target=watch)
    watcher.start()
    rng = random.Random(1)
    for number in range(0, 3000, 10):
        size = rng.choice((0, 100, 6000))
        level.store([page_of(n, size) for n in range(number, number + 10)], 60.0)
        level.load([key_of(rng.randrange(number + 10)) for _ in range(5)], 60.0)
        assert num_bytes(directory) <= MIN_CAPACITY_BYTES
        assert level.stats().num_bytes == num_bytes(directory)  # the lock's file is empty
    is_over.set()
    watcher.join()
    stats = level.stats()
    assert MIN_CAPACITY_BYTES // 2 < largest <= MIN_CAPACITY_BYTES
    assert stats.evicted["room"] > 0
    assert stats.rescued > 0
    assert stats.failures == 0
    level.close()


def test_the_bound_holds_over_the_index_of_tiny_pages(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    level = opened(directory, segment_bytes=30_000)
    for first in range(0, 12_000, 400):
        level.store([page_of(n, 0) for n in range(first, first + 400)], 60.0)
        assert num_bytes(directory) <= MIN_CAPACITY_BYTES
    assert level.stats().evicted["room"] > 0
    assert level.stats().num_pages == len(whole(level, range(12_000), 0)) > 2500
    level.close()


def test_a_smaller_bound_lets_the_oldest_go(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", 4 * MIN_CAPACITY_BYTES, segment_bytes=100_000)
    fill(level, range(400), 6000)
    level.close()
    level = opened(tmp_path / "cache", segment_bytes=100_000)
    assert num_bytes(tmp_path / "cache") <= MIN_CAPACITY_BYTES
    kept = whole(level, range(400), 6000)
    assert kept == set(range(min(kept), 400))
    assert len(kept) > 50
    level.close()


def test_used_pages_stay_and_must_be_used_again(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=100_000)
    fill(level, range(3), 6000)
    for number in range(3, 1000):
        level.store([page_of(number, 6000)], 60.0)
        assert whole(level, range(1), 6000) == {0}
    assert whole(level, range(1, 3), 6000) == set()
    for number in range(1000, 1400):
        level.store([page_of(number, 6000)], 60.0)
    assert whole(level, range(1), 6000) == set()
    level.close()


def grown(level: DiskLevel, chain: list[int], length: int) -> None:
    """Store the pages of a chain, which begins with page `chain[0]`, one after the other."""
    parents = [ROOT, *map(key_of, chain)]
    for number, parent in list(zip(chain, parents, strict=False))[-length:]:
        level.store([page_of(number, 6000, parent)], 60.0)


def num_from_head(level: DiskLevel, chain: list[int]) -> int:
    """How many of a chain's pages are found from its head on."""
    return [*level.contains([key_of(n) for n in chain]), False].index(False)


def test_heads_that_are_used_on_the_device_outlive_what_follows_them(tmp_path: Path) -> None:
    head = list(range(20))
    tails = [list(range(100 * i, 100 * i + 9)) for i in range(1, 41)]
    level = opened(tmp_path / "cache", segment_bytes=100_000)
    grown(level, head, 20)
    for tail in tails:
        assert level.touch([key_of(n) for n in head]) == [True] * 20
        grown(level, [*head, *tail], 9)
    for tail in tails:
        assert sum(level.contains([key_of(n) for n in tail])) == num_from_head(level, tail)
    left = crashed(tmp_path / "cache", tmp_path / "left")
    level.close()
    level = opened(left, segment_bytes=100_000)
    assert num_from_head(level, [*head, *tails[-1]]) == 29
    level.close()


@pytest.mark.parametrize("seed", range(6))
def test_no_page_leaves_before_one_that_follows_it(tmp_path: Path, seed: int) -> None:
    """Whatever is stored, used, read and killed, and at whatever size the disk is opened."""
    rng = random.Random(seed)
    parents: dict[int, int | None] = {}
    sizes = {"segment_bytes": 40_000}
    level = opened(tmp_path / "cache", **sizes)

    def chain_to(number: int) -> list[int]:
        chain: list[int] = []
        at: int | None = number
        while at is not None:
            chain.append(at)
            at = parents[at]
        return chain[::-1]

    for number in range(700):
        is_root = number < 3 or rng.random() < 0.1
        before = rng.randrange(max(0, number - 60), number) if not is_root else None
        if before is not None and not level.contains([key_of(before)])[0]:
            before = None
        parents[number] = before
        parent = ROOT if before is None else key_of(before)
        level.store([page_of(number, rng.choice([500, 6000, 15_000]), parent)], 60.0)
        chain = chain_to(rng.randrange(number + 1))
        match rng.randrange(12):
            case 0 | 1 | 2:
                level.touch([key_of(n) for n in chain])
            case 3:
                level.load([key_of(n) for n in chain], 60.0)
            case 4 if number % 5 == 0:
                left = crashed(tmp_path / "cache", tmp_path / f"left{number}")
                level.close()
                level = opened(left, rng.choice([MIN_CAPACITY_BYTES, 1_500_000]), **sizes)
                level.close()
                shutil.rmtree(tmp_path / "cache")
                left.rename(tmp_path / "cache")
                level = opened(tmp_path / "cache", **sizes)
                # Pages that had left and whose segment had not are back, their heads maybe not.
                here = level.contains([key_of(n) for n in range(number + 1)])
                orphans = [n for n, of in parents.items() if of is not None and not here[of]]
                parents.update(dict.fromkeys(orphans))
        here = level.contains([key_of(n) for n in range(number + 1)])
        for n, is_here in enumerate(here):
            of = parents[n]
            assert not is_here or of is None or here[of], f"{n} is here, {of} is not"
        assert num_bytes(tmp_path / "cache") <= MIN_CAPACITY_BYTES
    stats = level.stats()
    assert (stats.corrupt, stats.failures) == (0, 0)
    level.close()


def test_pages_that_leave_as_they_came_are_not_written_again(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=100_000)
    fill(level, range(1000), 6000)
    assert level.stats().evicted["room"] > 700
    assert level.stats().rescued == 0
    level.close()


def test_pages_used_at_random_are_written_again_no_oftener_than_once_a_turn(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=60_000)
    rng = random.Random(4)
    for number in range(1500):
        fill(level, range(number, number + 1), 6000)
        level.touch([key_of(rng.randrange(max(0, number - 200), number + 1)) for _ in range(3)])
    stats = level.stats()
    assert stats.rescued <= stats.stored
    assert (stats.num_pages or 0) * 6100 > 0.6 * MIN_CAPACITY_BYTES
    level.close()


def test_a_chain_longer_than_the_disk_keeps_its_beginning(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=60_000)
    chain = list(range(300))
    parents = [ROOT, *map(key_of, chain)]
    pages = [page_of(n, 6000, parent) for n, parent in zip(chain, parents, strict=False)]
    num_here = level.store(pages, 60.0)
    assert 100 < num_here == num_from_head(level, chain) == level.stats().num_pages < 170
    assert level.stats().refused == 300 - num_here
    level.store([page_of(1000, 6000)], 60.0)  # who comes later counts for more than the end
    assert level.contains([key_of(1000)]) == [True]
    assert num_from_head(level, chain) == (level.stats().num_pages or 0) - 1
    level.close()


@pytest.mark.parametrize("at_once", [1, 4, 300])
def test_a_chain_longer_than_the_disk_keeps_what_can_be_found_of_it(
    tmp_path: Path, at_once: int
) -> None:
    level = opened(tmp_path / "pages")
    pages = [page_of(0, 6000)]
    while len(pages) < 300:
        pages.append(page_of(len(pages), 6000, pages[-1].key))
    keys = [page.key for page in pages]
    for _ in range(3):
        for first in range(0, len(pages), at_once):
            level.store(pages[first : first + at_once], 10.0)
        kept = level.contains(keys)
        assert kept.index(False) == sum(kept) > 60
    stored = level.stats().written_bytes
    assert all(level.touch(keys)), "nothing that another store would bring is lost"
    assert stored < 2 * MIN_CAPACITY_BYTES
    level.close()


def test_two_that_bring_the_same_pages_leave_each_once(tmp_path: Path) -> None:
    level = opened(tmp_path / "pages")
    pages = [page_of(0, 6000)]
    while len(pages) < 300:
        pages.append(page_of(len(pages), 6000, pages[-1].key))
    start = threading.Barrier(2)

    def bring() -> None:
        for first in range(0, len(pages), 3):
            start.wait(10)
            level.store(pages[first : first + 3], 10.0)

    threads = [threading.Thread(target=bring) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = level.contains([page.key for page in pages])
    assert kept.index(False) == sum(kept) == level.stats().stored
    fill(level, range(1000, 1400), 6000)
    assert level.stats().failures == 0
    assert len(whole(level, range(1000, 1400), 6000)) > 60
    level.close()


def test_a_page_larger_than_a_segment_has_one_of_its_own(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=10_000)
    fill(level, range(3), 50_000)
    assert whole(level, range(3), 50_000) == {0, 1, 2}
    assert level.store([page_of(9, 2 * MIN_CAPACITY_BYTES)], 60.0) == 0
    assert level.stats().refused == 1
    level.close()


def test_a_clear_that_leaves_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level = opened(tmp_path / "cache", segment_bytes=1000)
    fill(level, range(10))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(f"{path} stays")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(OSError, match="bytes can't be deleted"):
            level.clear()
    assert segments_of(tmp_path / "cache") != []


def test_a_medium_that_holds_a_write_holds_neither_clear_nor_close_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    level = opened(tmp_path / "cache")
    fill(level, range(3))
    monkeypatch.setattr("kvpaging.levels.disk._PATIENCE_S", 0.05)
    with level._write_lock:
        with pytest.raises(TimeoutError, match="has not ended"):
            level.clear()
        assert whole(level, range(3)) == {0, 1, 2}
        level.close()
        assert "does not end" in caplog.text
        assert level.contains([key_of(0)]) == [False]


def test_clear_forgets_all(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=1000)
    fill(level, range(10))
    whole(level, range(10))
    level.clear()
    counts = {str(cause): 10 * (cause is EvictionCause.FLUSH) for cause in EvictionCause}
    assert level.stats().evicted == counts
    assert whole(level, range(10)) == set()
    assert segments_of(tmp_path / "cache") == []
    fill(level, range(10))
    level.close()
    level = opened(tmp_path / "cache")
    assert whole(level, range(10)) == set(range(10))
    level.close()


# Crashes, cuts and flips.


@pytest.mark.parametrize("has_index", [True, False])
def test_cut_at_every_byte(tmp_path: Path, has_index: bool) -> None:
    level = opened(tmp_path / "cache")
    fill(level, range(3))
    if has_index:
        level.close()
    left = crashed(tmp_path / "cache", tmp_path / "left")
    level.close()
    size = segments_of(left)[0].stat().st_size
    assert size == 3 * VALUE_BYTES
    for end in range(size + 1):
        copy = crashed(left, tmp_path / "copy")
        os.truncate(segments_of(copy)[0], end)
        level = opened(copy)
        assert level.stats().num_pages == end // VALUE_BYTES
        assert whole(level, range(3)) == set(range(end // VALUE_BYTES))
        fill(level, range(3, 4))  # it goes on behind the last whole page
        level.close()
        level = opened(copy)
        assert whole(level, range(5)) == {*range(end // VALUE_BYTES), 3}
        level.close()


@pytest.mark.parametrize("has_index", [True, False])
def test_every_flipped_byte_is_a_miss_with_a_count(tmp_path: Path, has_index: bool) -> None:
    level = opened(tmp_path / "cache")
    fill(level, range(3))
    level.close()
    path = segments_of(tmp_path / "cache")[0]
    data = path.read_bytes()
    rng = random.Random(2)
    for i in range(len(data)):
        broken = bytearray(data)
        broken[i] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        if not has_index:
            index_of(tmp_path / "cache").unlink()
        level = opened(tmp_path / "cache")
        expected = {0, 1, 2} - {i // VALUE_BYTES}
        found = whole(level, range(3))
        assert found == expected if has_index else found <= expected
        assert found >= set(range(i // VALUE_BYTES))
        assert level.stats().corrupt == 1
        assert level.stats().num_pages == len(found)
        level.close()


def test_a_broken_index_costs_nothing_but_a_scan(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=1000)
    fill(level, range(9))
    level.close()
    index = index_of(tmp_path / "cache")
    data = index.read_bytes()
    rng = random.Random(3)
    damages = [data[: rng.randrange(len(data))] for _ in range(60)]
    for _ in range(300):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        damages.append(bytes(broken))
    damages += [b"", b"not a database" * 1000, rng.randbytes(len(data))]
    for damage in damages:
        index.write_bytes(damage)
        level = opened(tmp_path / "cache")
        assert whole(level, range(9)) == set(range(9))
        level.close()


def test_a_broken_page_can_be_stored_again(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache")
    fill(level, range(3))
    path = segments_of(tmp_path / "cache")[0]
    data = bytearray(path.read_bytes())
    data[VALUE_BYTES + 100] ^= 1
    path.write_bytes(data)
    assert whole(level, range(3)) == {0, 2}
    fill(level, range(1, 2))
    assert whole(level, range(3)) == {0, 1, 2}
    level.close()
    level = opened(tmp_path / "cache")
    assert whole(level, range(3)) == {0, 1, 2}
    level.close()


def test_a_page_stored_again_outlives_its_first_segment(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=100_000)
    fill(level, range(2), 6000)
    path = segments_of(tmp_path / "cache")[0]
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert whole(level, range(2), 6000) == {1}
    fill(level, range(2, 60), 6000)
    fill(level, range(1), 6000)
    assert whole(level, range(1, 2), 6000) == {1}
    number = 60
    while path.exists():
        fill(level, range(number, number + 1), 6000)
        number += 1
    assert level.contains([key_of(n) for n in range(2)]) == [True, True]
    assert whole(level, range(2), 6000) == {0, 1}
    assert level.stats().rescued == 1
    level.close()


def test_a_segment_that_vanishes_is_a_miss(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=1000)
    fill(level, range(9))
    segments_of(tmp_path / "cache")[0].unlink()
    lost = 1000 // VALUE_BYTES
    assert whole(level, range(9)) == set(range(lost, 9))
    assert level.stats().failures > 0
    level.close()
    level = opened(tmp_path / "cache")
    assert level.contains([key_of(n) for n in range(9)]) == [n >= lost for n in range(9)]
    level.close()


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Writes beyond `limit` fail half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_the_page_alone(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=500_000)
    fill(level, range(30), 2000)
    size = segments_of(tmp_path / "cache")[0].stat().st_size
    for room in (0, 1, 130, 1999):
        with file_size_limit(size + room):
            assert level.store([page_of(99, 2000)], 60.0) == 0
        assert segments_of(tmp_path / "cache")[0].stat().st_size == size
        assert whole(level, range(100), 2000) == set(range(30))
    with file_size_limit(100):
        level.close()  # nor can the index be written
    assert level.stats().failures >= 5
    level = opened(tmp_path / "cache")
    fill(level, range(30, 40), 2000)
    level.close()
    level = opened(tmp_path / "cache")
    assert whole(level, range(100), 2000) == set(range(40))
    level.close()


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from level_pages import ROOT, page_of
from kvpaging.levels.disk import DiskLevel
level = DiskLevel(Path(sys.argv[2]), 1 << 20, root=ROOT, item_bytes=2, segment_bytes=60_000)
number = int(sys.argv[3])
while True:
    assert level.store([page_of(n, 3000) for n in range(number, number + 3)], 60.0) == 3
    number += 3
    print(number, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """What a killed process had stored is there, what it was storing is there whole or not."""
    support = Path(__file__).parents[2] / "support"
    rng = random.Random()
    end = 0
    for _ in range(4):
        command = [
            sys.executable,
            "-P",
            "-c",
            KILLED,
            str(support),
            str(tmp_path / "cache"),
            str(end),
        ]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        lines = [writer.stdout.readline()]
        timer = threading.Timer(rng.uniform(0, 0.15), writer.kill)
        timer.start()
        lines += writer.stdout.readlines()
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
        first, end = end, int([line for line in lines if line.endswith(b"\n")][-1])
        assert end > first
        assert num_bytes(tmp_path / "cache") <= 1 << 20
        level = opened(tmp_path / "cache", segment_bytes=60_000)
        found = whole(level, range(end + 3), 3000)
        assert found >= set(range(max(0, end - 150), end))  # older ones may have left
        assert level.stats().corrupt <= 1  # the torn one
        level.close()


def test_threads_at_once(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=60_000)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                first = rng.randrange(400)
                level.store([page_of(n, 3000) for n in range(first, first + 4)], 60.0)
                first = rng.randrange(400)
                whole(level, range(first, first + 10), 3000)
                if rng.random() < 0.05:
                    level.clear()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert level.stats().corrupt == 0
    assert num_bytes(tmp_path / "cache") <= MIN_CAPACITY_BYTES
    level.close()


def test_remembers_what_left_when_and_why(tmp_path: Path) -> None:
    now = [100.0]
    level = opened(tmp_path / "cache", segment_bytes=128 << 10, clock=lambda: now[0])
    keys = [key_of(n) for n in range(16)]
    fill(level, range(1), 100_000)
    [one] = segments_of(tmp_path / "cache")
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    one.write_bytes(content)
    assert whole(level, range(1), 100_000) == set()
    assert level.evicted(keys[:2]) == [Evicted(0.0, EvictionCause.CORRUPT), None]
    now[0] = 110.0
    fill(level, range(1, 16), 100_000)
    now[0] = 112.5
    here = level.contains(keys)
    assert 0 < sum(here) < 15
    for told, is_here in zip(level.evicted(keys)[1:], here[1:], strict=True):
        assert told == (None if is_here else Evicted(2.5, EvictionCause.ROOM))
    level.clear()
    told = level.evicted(keys)
    assert [one and one.cause for one, is_here in zip(told, here, strict=True) if is_here] == [
        EvictionCause.FLUSH
    ] * sum(here)
    level.close()


def test_a_page_that_was_kept_because_it_was_used_has_not_left(tmp_path: Path) -> None:
    level = opened(tmp_path / "cache", segment_bytes=128 << 10)
    fill(level, range(1), 20_000)
    for number in range(1, 100):
        assert whole(level, range(1), 20_000) == {0}
        fill(level, range(number, number + 1), 20_000)
    assert level.stats().rescued > 0
    assert level.evicted([key_of(0), key_of(1)])[0] is None
    assert level.evicted([key_of(1)])[0] is not None
    level.close()


def test_whose_pages_are_there_is_known_at_opening(tmp_path: Path) -> None:
    """Also where several servers wrote to one segment."""
    roots = [PageKey(bytes([n]) * 32) for n in range(7)]
    for n, root in enumerate(roots):
        level = opened(tmp_path / "pages", root=root)
        assert level.other_roots == tuple(reversed(roots[max(0, n - 4) : n]))
        fill(level, range(10 * n, 10 * n + 3))
        level.close()
    assert len(list((tmp_path / "pages").glob("*.pages"))) == 1
    again = opened(tmp_path / "pages", root=roots[5])
    assert again.other_roots == (roots[6], roots[4], roots[3], roots[2])
    again.close()
    late = opened(tmp_path / "pages", root=roots[4])
    fill(late, range(100, 103))
    late.close()
    last = opened(tmp_path / "pages", root=roots[0])
    assert last.other_roots == (roots[4], roots[6], roots[5], roots[3])
    last.close()
