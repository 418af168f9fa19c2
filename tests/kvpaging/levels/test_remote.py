"""The remote level against a real Redis server, and against servers that hang, drip and lie."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from level_pages import ROOT, key_of, page_of

pytest.importorskip("redis", reason="needs redis-py: pip install 'kvpaging[remote]'")

import redis
from redis_servers import (
    Behaviour,
    always,
    drip,
    hang,
    hang_deaf,
    hang_up,
    never_greet,
    proxy,
    redis_server,
    server,
)

from kvpaging.base.errors import ConfigError
from kvpaging.levels.remote import RemoteLevel, Seal

SECRET = b"a secret of the operator"
DEADLINE_S = 0.2
SLACK_S = 20.0
"""For a machine that does other things too; without a deadline these calls would take half a minute
or never end."""


@contextlib.contextmanager
def remote(url: str, **options: object) -> Iterator[RemoteLevel]:
    settings = {"secret": SECRET, "root": ROOT, "item_bytes": 2, "batch_deadline_s": 5.0, **options}
    level = RemoteLevel(url, **settings)  # type: ignore[arg-type]
    try:
        yield level
    finally:
        level.close()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def url(real: str) -> str:
    """The real server, empty."""
    redis.Redis.from_url(real).flushall()
    return real


def whole(level: RemoteLevel, numbers: range, deadline_s: float = 30.0) -> list[int]:
    """The pages that the level answers; each must be right."""
    answers = level.load([key_of(n) for n in numbers], deadline_s)
    for number, page in zip(numbers, answers, strict=True):
        assert page is None or page == page_of(number)
    return [n for n, page in zip(numbers, answers, strict=True) if page is not None]


def fill(level: RemoteLevel, numbers: range) -> None:
    assert level.store([page_of(n) for n in numbers], 30.0) == len(numbers)


def test_pages_that_are_used_elsewhere_are_renewed_now_and_then(url: str) -> None:
    now = [0.0]
    client = redis.Redis.from_url(url)
    with remote(url, ttl_s=1000.0, clock=lambda: now[0]) as level:
        fill(level, range(3))
        keys = [key_of(n) for n in range(4)]
        names = {n: level._seal.name(key_of(n)) for n in range(3)}
        for name in names.values():
            client.pexpire(name, 50_000)
        assert level.touch(keys) == [True, True, True, False]  # only of the last it had to ask
        assert all(client.pttl(name) <= 50_000 for name in names.values())
        now[0] = 126.0
        client.delete(names[1])
        assert level.touch(keys) == [True, False, True, False]
        assert all(client.pttl(names[n]) > 990_000 for n in (0, 2))
        assert level.touch(keys) == [True] * 4, "asked about so lately that nobody asks"
        level.clear()
        assert level.touch(keys) == [False] * 4


def test_of_a_server_that_is_not_there_nothing_is_known_to_be_lost() -> None:
    with remote("redis://127.0.0.1:1/0") as level:
        for _ in range(5):
            assert level.touch([key_of(1)]) == [True]


def test_a_server_that_takes_no_pages_is_asked_for_each_once_in_a_while(tmp_path: Path) -> None:
    now = [0.0]
    keys = [key_of(n) for n in range(3)]
    with (
        redis_server(tmp_path, "--maxmemory", "1") as url,
        remote(url, ttl_s=800.0, clock=lambda: now[0]) as level,
    ):
        level._broken.add(keys[2])
        assert level.touch(keys) == [False] * 3
        for _ in range(3):
            assert level.touch(keys) == [True] * 3, "each use would send all of them again"
        assert level.store([page_of(n) for n in range(3)], 30.0) == 0
        now[0] = 99.0
        assert level.touch(keys) == [True] * 3
        now[0] = 101.0
        assert level.touch(keys) == [False] * 3


def test_what_may_not_be_renewed_is_not_known_to_be_lost(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url, remote(url) as level:
        fill(level, range(2))
        level._renewed_s.clear()
        redis.Redis.from_url(url).replicaof("127.0.0.1", "1")  # from now on it is read-only
        keys = [key_of(n) for n in range(2)]
        assert level.touch(keys) == [True] * 2
        assert level.stats().failures == 2
        assert level.touch(keys) == [True] * 2
        assert level.stats().failures == 2, "asked once"


def test_two_servers_share_pages(url: str) -> None:
    with remote(url) as ours, remote(url, compress=False) as theirs:
        fill(ours, range(300))
        assert whole(theirs, range(310)) == list(range(300))
        assert theirs.contains([key_of(n) for n in range(311)]) == [
            *[True] * 300,
            *[False] * 10,
            True,
        ]
        assert theirs.stats().hits == 300
        assert theirs.store([page_of(n) for n in range(299, 301)], 30.0) == 2
        assert (theirs.stats().known, theirs.stats().stored) == (1, 1)


def test_pages_expire_and_use_renews_them(url: str) -> None:
    with remote(url, ttl_s=1000.0) as level:
        fill(level, range(2))
        client = redis.Redis.from_url(url)
        names = list(client.scan_iter())
        assert all(990_000 < client.pttl(name) <= 1_000_000 for name in names)
        for name in names:
            client.pexpire(name, 5000)
        level.store([page_of(0)], 30.0)
        assert sorted(client.pttl(name) > 5000 for name in names) == [False, True]
        client.flushall()
        assert whole(level, range(2)) == []


def test_another_secret_or_root_meets_nothing(url: str) -> None:
    with (
        remote(url) as ours,
        remote(url, secret=b"another operator's") as other,
        remote(url, root=b"other weights".ljust(32)) as swapped,
    ):
        fill(ours, range(3))
        assert whole(other, range(3)) == []
        assert whole(swapped, range(3)) == []
        other.clear()
        assert whole(ours, range(3)) == [0, 1, 2]
        ours.clear()
        assert whole(ours, range(3)) == []
        assert redis.Redis.from_url(url).dbsize() == 0


def test_a_server_that_can_not_be_emptied_says_so(url: str) -> None:
    with remote(url) as level:
        fill(level, range(3))
        client = redis.Redis.from_url(url)
        client.execute_command("ACL", "SETUSER", "default", "-unlink")
        try:
            with pytest.raises(ConnectionError, match=r"keeps pages: .*unlink"):
                level.clear()
        finally:
            client.execute_command("ACL", "SETUSER", "default", "+unlink")
        assert whole(level, range(3)) == [0, 1, 2]
    with pytest.raises(ConnectionError, match="keeps pages"):
        level.clear()  # closed: nobody answers


def test_what_was_missed_is_not_asked_for_again_at_once(url: str) -> None:
    now = [0.0]
    with remote(url, clock=lambda: now[0]) as level:
        assert level.contains([key_of(0), key_of(1)]) == [True, True]
        assert whole(level, range(2)) == []
        assert level.contains([key_of(0), key_of(1)]) == [False, False]
        level.store([page_of(1)], 30.0)
        assert level.contains([key_of(0), key_of(1)]) == [False, True]
        now[0] = 2.5
        assert level.contains([key_of(0), key_of(1)]) == [True, True]


def test_the_server_learns_no_keys(url: str) -> None:
    with remote(url) as level:
        fill(level, range(3))
    for name in redis.Redis.from_url(url).scan_iter():
        for number in range(3):
            assert key_of(number) not in name
            assert key_of(number).hex().encode() not in name


def test_every_changed_byte_is_a_miss_and_is_mended(url: str) -> None:
    client = redis.Redis.from_url(url)
    name = Seal(SECRET).name(key_of(1))
    with remote(url) as level:
        level.store([page_of(1)], 30.0)
        value = client.get(name)
        assert isinstance(value, bytes)
        for i in range(len(value)):
            client.set(name, value[:i] + bytes([value[i] ^ 0x10]) + value[i + 1 :])
            assert whole(level, range(1, 2)) == []
        assert level.stats().corrupt == len(value)
        for broken in (b"", value[:20], value[:-1], value + b"x"):
            client.set(name, broken)
            assert whole(level, range(1, 2)) == []
        level.store([page_of(1)], 30.0)  # it is written although the server has one
        assert whole(level, range(1, 2)) == [1]


def test_a_page_under_another_name_is_a_miss(url: str) -> None:
    client = redis.Redis.from_url(url)
    seal = Seal(SECRET)
    with remote(url) as level:
        fill(level, range(2))
        client.copy(seal.name(key_of(0)), seal.name(key_of(1)), replace=True)
        client.lpush(seal.name(key_of(2)), b"not a string")
        assert whole(level, range(3)) == [0]
        assert level.stats().failures == 1  # WRONGTYPE


def test_a_server_that_is_full_takes_nothing_and_still_answers(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url, remote(url) as level:
        fill(level, range(3))
        redis.Redis.from_url(url).config_set("maxmemory", 1)
        assert level.store([page_of(n) for n in range(5)], 30.0) == 3
        assert level.stats().refused == 2
        assert whole(level, range(5)) == [0, 1, 2]


def test_password_and_database(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--requirepass", "se/cret") as url:
        with remote(url) as level:
            assert level.store([page_of(0)], 30.0) == 0
            assert level.stats().failures > 0
        path = url.removeprefix("unix://")
        with (
            server(proxy(path, lambda data: data)) as tcp,
            remote(tcp.replace("//", "//:se%2Fcret@") + "/3") as level,
        ):
            fill(level, range(3))
            assert whole(level, range(3)) == [0, 1, 2]
        client = redis.Redis(unix_socket_path=path, password="se/cret", db=3)
        assert client.dbsize() == 3


def test_comes_back_after_a_restart(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with redis_server(tmp_path) as url:
            level = stack.enter_context(remote(url))
            fill(level, range(3))
        assert whole(level, range(3)) == []
        with redis_server(tmp_path):
            fill(level, range(3))
            assert whole(level, range(3)) == [0, 1, 2]
            assert level.stats().failures == 1


BAD_SERVERS: dict[str, Behaviour] = {
    "never greets": never_greet,
    "hangs": hang,
    "hangs and does not read": hang_deaf,
    "drips": drip,
    "hangs up": hang_up,
    "says OK to everything": always(b"+OK\r\n"),
    "says 1 to everything": always(b":1\r\n"),
    "has empty values": always(b"$0\r\n\r\n"),
    "has values of noise": always(b"$9\r\n\x00\xff\x80abcdef\r\n"),
    "has nothing": always(b"$-1\r\n"),
    "refuses": always(b"-NOAUTH who are you\r\n"),
    "is loading": always(b"-LOADING wait\r\n"),
    "speaks no Redis": always(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "counts wrongly": always(b"$-5\r\nx\r\n"),
    "counts in words": always(b"$many\r\n"),
    "nests": always(b"*1\r\n" * 400),
    "nests without end": always(b"*1\r\n" * 5000),
    "promises much": always(b"$99999999999999\r\n"),
    "promises many": always(b"*99999999999999\r\n"),
}


@pytest.mark.parametrize("behave", BAD_SERVERS.values(), ids=BAD_SERVERS)
def test_a_bad_server_costs_the_deadline_and_never_an_answer(behave: Behaviour) -> None:
    pages = [page_of(n, 200_000) for n in range(10)]
    keys = [page.key for page in pages]
    with server(behave) as url, remote(url, batch_deadline_s=DEADLINE_S) as level:
        for _ in range(2):
            started = time.monotonic()
            assert level.load(keys, 1.0) == [None] * 10
            assert time.monotonic() - started < DEADLINE_S + SLACK_S
            started = time.monotonic()
            level.store(pages, 1.0)
            assert time.monotonic() - started < 1.0 + SLACK_S
    assert not [t for t in threading.enumerate() if t.name == "kvpaging-redis"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files by /proc")
def test_connections_given_up_are_closed_though_nobody_reads_them() -> None:
    def num_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with server(hang_deaf) as url, remote(url, batch_deadline_s=0.5) as level:
        before = num_files()
        for _ in range(3):  # then the breaker opens
            level._send([page_of(0)], [bytes(32 << 20)], time.monotonic() + 5.0)
        assert level.stats().failures == 3
        expected = before + 3  # the other side's
        end = time.monotonic() + 60
        while num_files() > expected:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_server_that_is_not_there() -> None:
    with server(hang) as url:
        pass
    with remote(url) as level:
        assert level.load([key_of(0)], 1.0) == [None]
        assert level.stats().failures == 1
        assert level.stats().late == 1


def test_the_prefix_that_arrived_in_time_is_kept(url: str) -> None:
    with remote(url, compress=False) as level:
        fill(level, range(100))
    left = 25_000

    def first_only(data: bytes) -> bytes:
        """Let about 30 pages' bytes pass, and then nothing."""
        nonlocal left
        passed = data[:left]
        left -= len(passed)
        return passed

    with (
        server(proxy(url.removeprefix("unix://"), first_only)) as slow,
        remote(slow, batch_deadline_s=2.0) as level,
    ):
        level._value_bytes = 1000  # as if pages had been seen: all in one batch
        started = time.monotonic()
        found = whole(level, range(100))
        assert time.monotonic() - started < 2.0 + SLACK_S
        assert 20 < len(found) < 35
        assert found == list(range(len(found)))
        assert level.stats().late == 100 - len(found)


def test_random_damage_on_the_way(url: str) -> None:
    """Replies with flipped, missing and doubled bytes: each page is right or a miss."""
    rng = random.Random(5)

    def damage(data: bytes) -> bytes:
        if rng.random() < 0.6:
            return data
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            case 1:
                return data[:at] + data[at + 1 :]
            case 2:
                return data[:at] + data[at : at + 7] + data[at:]
            case _:
                return data[:at]

    with remote(url) as level:
        fill(level, range(20))
    hits = num_rounds = 0
    with server(proxy(url.removeprefix("unix://"), damage)) as bad:
        # On a slow machine most replies are late.
        while num_rounds < 40 or (hits <= 20 and num_rounds < 400):
            num_rounds += 1
            with remote(bad, batch_deadline_s=0.1) as level:
                first = rng.randrange(15)
                hits += len(whole(level, range(first, first + 8), 0.3))
    assert hits > 20


def test_the_breaker_leaves_a_dead_server_alone() -> None:
    now = [0.0]
    asked = threading.Semaphore(0)

    def count(connection: object) -> None:
        asked.release()

    settings = {"clock": lambda: now[0], "batch_deadline_s": 30.0}
    with server(count) as url, remote(url, **settings) as level:

        def attempts(number: int) -> int:
            for _ in range(number):
                level.load([key_of(0)], 30.0)
            seen = 0
            while asked.acquire(blocking=False):  # each was counted before it was hung up
                seen += 1
            return seen

        assert level.contains([key_of(0)]) == [True]
        assert attempts(10) == 3
        assert level.contains([key_of(0)]) == [False]
        assert level.stats().refused == 7
        now[0] = 1.1
        assert attempts(5) == 1
        now[0] = 2.0
        assert attempts(5) == 0
        now[0] = 3.2
        assert attempts(5) == 1


def test_bytes_in_flight_are_bounded(url: str) -> None:
    with remote(url, in_flight_bytes=100_000, batch_bytes=50_000, compress=False) as level:
        assert level.store([page_of(n, 20_000) for n in range(20)], 30.0) == 20
        assert level.store([page_of(99, 200_000)], 30.0) == 0
        assert level.stats().refused == 1


def test_threads_at_once(url: str) -> None:
    found: list[list[int]] = []
    with remote(url) as level:

        def work(first: int) -> None:
            fill(level, range(first, first + 40))
            found.append(whole(level, range(first, first + 40)))

        threads = [threading.Thread(target=work, args=(20 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(map(len, found)) == [40] * 4


def test_is_closed_once_and_for_all(url: str) -> None:
    with remote(url) as level:
        fill(level, range(2))
        level.close()
        assert level.load([key_of(0)], 1.0) == [None]
        assert level.store([page_of(0)], 1.0) == 0


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://host", "must begin with"),
        ("host:6379", "must begin with"),
        ("redis://", "no host"),
        ("redis://host:port", "can't be read"),
        ("redis://host/name", "must be a number"),
        ("redis://host?decode_responses=true", "not known: decode_responses"),
    ],
)
def test_urls_that_are_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RemoteLevel(url, secret=SECRET, root=ROOT, item_bytes=2)


def test_urls_that_are_taken() -> None:
    for url in ("redis://host", "rediss://user:p%40ss@host:1/2?ssl_ca_certs=/ca.pem"):
        RemoteLevel(url, secret=SECRET, root=ROOT, item_bytes=2).close()


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="secret"):
        RemoteLevel("redis://host", secret=b"short", root=ROOT, item_bytes=2)
