"""Pages on a server that speaks the Redis protocol, which other servers may share.

The server is not trusted: names and values are made with a secret, so that it can neither tell
whether a known prompt is there nor make up or swap a page. It can read the payloads; TLS
(`rediss://`) hides them on the way.

    name     "kvpaging:" + 16 hex digits of the secret + ":" + BLAKE2b(page key) by the secret
    value    BLAKE2b over the rest, by the secret (32 bytes), then the value of `codec`

Pages are fetched by pipelined GETs and not by one MGET: its reply is one value, which is all or
nothing at a deadline; of a pipeline the prefix that arrived in time is kept.

Knows nothing of connections (`redis_link` does) or of what the pages mean.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Final, Literal

from kvpaging.base.clock import Clock, monotonic
from kvpaging.base.errors import ConfigError
from kvpaging.base.evictions import Evicted
from kvpaging.base.ids import PageKey
from kvpaging.levels.breaker import CircuitBreaker
from kvpaging.levels.codec import BadValue, PageCodec
from kvpaging.levels.level import Complaints, Counters, LevelStats, StoredPage
from kvpaging.levels.redis_link import Command, RedisLink, Refusal

MIN_SECRET_BYTES: Final = 16
DEFAULT_TTL_S: Final = 7 * 24 * 3600.0
DEFAULT_BATCH_DEADLINE_S: Final = 0.2
_BATCH_BYTES: Final = 8 << 20
_IN_FLIGHT_BYTES: Final = 64 << 20
_MAX_BATCH_PAGES: Final = 128
_FIRST_BATCH_PAGES: Final = 4
"""As long as no value's size is known."""
_COMMAND_BYTES: Final = 200
"""What a question and its answer take, at most."""
_CLEAR_S: Final = 30.0
_MISS_LASTS_S: Final = 2.0
"""How long a page that was not there is not asked for again."""
_MAX_REMEMBERED: Final = 100_000
_RENEW_EVERY_S: Final = 600.0
"""A page that is used all the time is renewed so often, or eight times in its time to live."""
_MAX_RENEWED: Final = 8192
"""Pages renewed at once; of a longer chain the others are, the next time."""
_MAC_BYTES: Final = 32


_Trouble = Literal["late", "refused"]
"""What became of pages that were not answered; also the name of their counter."""


class Seal:
    """The keyed names and the authentication of values, from one secret."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise ConfigError(
                f"the remote cache's secret has {len(secret)} bytes; "
                f"give at least {MIN_SECRET_BYTES}"
            )
        self._name_key = _derive(secret, b"names")
        self._mac_key = _derive(secret, b"values")
        self.prefix = b"kvpaging:" + _derive(secret, b"prefix")[:8].hex().encode() + b":"

    def name(self, key: PageKey) -> bytes:
        """What a page is called on the server."""
        return (
            self.prefix
            + hashlib.blake2b(key, key=self._name_key, digest_size=24).hexdigest().encode()
        )

    def close(self, value: bytes) -> bytes:
        """The value with its authentication before it."""
        return self._mac(value) + value

    def open(self, sealed: bytes) -> memoryview:
        """The value. Raises BadValue if it was not made with this secret."""
        value = memoryview(sealed)[_MAC_BYTES:]
        if not hmac.compare_digest(self._mac(value), sealed[:_MAC_BYTES]):
            raise BadValue("its authentication fails")
        return value

    def _mac(self, value: bytes | memoryview) -> bytes:
        return hashlib.blake2b(value, key=self._mac_key, digest_size=_MAC_BYTES).digest()


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return hmac.digest(secret, b"kvpaging remote cache 1 " + purpose, "sha256")


class _Budget:
    """Bytes that may be under way at once."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> bool:
        with self._lock:
            if num_bytes > self._left:
                return False
            self._left -= num_bytes
            return True

    def give(self, num_bytes: int) -> None:
        with self._lock:
            self._left += num_bytes


class RemoteLevel:
    """Pages on a server, as long as it keeps them; a `level.Level`.

    Each batch has a deadline of its own, within the call's. After the first batch that fails or is
    late the rest is a miss; after several in a row the server is left alone for a while.
    """

    name = "remote"

    def __init__(
        self,
        url: str,
        *,
        secret: bytes,
        root: bytes,
        item_bytes: int,
        compress: bool = True,
        ttl_s: float = DEFAULT_TTL_S,
        batch_deadline_s: float = DEFAULT_BATCH_DEADLINE_S,
        batch_bytes: int = _BATCH_BYTES,
        in_flight_bytes: int = _IN_FLIGHT_BYTES,
        clock: Clock = monotonic,
    ) -> None:
        """Connect to nothing yet: a server that is not there is a miss like any other.

        Raises ConfigError for a URL or secret that can't be used.

        Args:
            url: `redis://[[user]:password@]host[:port][/db]`, `rediss://` for TLS, or `unix://`.
            secret: at least 16 bytes, the same on all servers that share pages.
            root: the numerics identity's root key.
            item_bytes: the size of the payload's items (2 for bfloat16).
            compress: whether values are compressed; what is there is read either way.
            ttl_s: how long the server keeps a page after it was stored last.
            batch_deadline_s: bound on each exchange.
            batch_bytes: about how much one exchange carries.
            in_flight_bytes: what all calls may have under way; more is refused.
            clock: for deadlines and times.
        """
        self._seal = Seal(secret)
        self._codec = PageCodec(root, item_bytes, compress=compress)
        self._ttl_ms = max(1, int(ttl_s * 1000))
        self._batch_deadline_s = batch_deadline_s
        self._batch_bytes = batch_bytes
        self._budget = _Budget(in_flight_bytes)
        self._clock = clock
        self._breaker = CircuitBreaker(clock)
        self._counters = Counters()
        self._complaints = Complaints(logging.getLogger(__name__), clock)
        self._value_bytes: int | None = None
        """The largest value seen so far: what a page to fetch is reckoned as."""
        self._broken: set[PageKey] = set()
        """Pages whose values on the server are not to be kept."""
        self._missing_until_s: dict[PageKey, float] = {}
        self._renew_every_s = min(_RENEW_EVERY_S, ttl_s / 8)
        self._renewed_s: dict[PageKey, float] = {}
        """When pages were stored, renewed, or said not to be there, last, from here."""
        self._link = RedisLink(url)

    def contains(self, keys: Sequence[PageKey]) -> list[bool]:
        """Which pages may be there: all but those just missed, and none while the breaker is open.

        Answers at once and asks nobody: other servers may have stored any page, and asking would
        cost as long as finding that a load misses.
        """
        if self._breaker.is_open:
            return [False] * len(keys)
        now_s = self._clock()
        return [self._missing_until_s.get(key, now_s) <= now_s for key in keys]

    def load(self, keys: Sequence[PageKey], deadline_s: float) -> list[StoredPage | None]:
        """Each page, whole, authentic and checked, or `None`.

        Takes at most the deadline, and the time to check what arrived within it.
        """
        started = self._clock()
        found: list[StoredPage | None] = []
        trouble: _Trouble | None = None
        while len(found) < len(keys) and trouble is None:
            num_pages, num_bytes = self._next_batch()
            batch = keys[len(found) : len(found) + num_pages]
            commands = [(b"GET", self._seal.name(key)) for key in batch]
            replies, trouble = self._exchange(commands, num_bytes, started + deadline_s)
            found += self._open(batch, replies)
            self._note_missing(batch, replies)
        missing = len(keys) - len(found)
        hits = [page for page in found if page is not None]
        self._counters.add(
            loads=len(keys),
            hits=len(hits),
            loaded_payload_bytes=sum(len(page.payload) for page in hits),
            load_s=self._clock() - started,
            **({trouble: missing} if trouble else {}),
        )
        return found + [None] * missing

    def store(self, pages: Sequence[StoredPage], deadline_s: float) -> int:
        """Send the pages that the server has not, and renew the others' time to live."""
        started = self._clock()
        end_s = started + deadline_s
        here, trouble = self._renew([page.key for page in pages], end_s)
        known = {key for key, is_here in here.items() if is_here}
        new = [page for page in pages if page.key not in known]
        answered = stored = 0
        for batch, values in self._batches([] if trouble else new):
            replies, trouble = self._send(batch, values, end_s)
            answered += len(replies)
            stored += sum(reply == b"OK" for reply in replies)
            if trouble:
                break
        self._counters.add(stores=len(pages), known=len(known), store_s=self._clock() - started)
        if trouble:
            self._counters.add(**{trouble: len(new) - answered})
        return len(known) + stored

    def touch(self, keys: Sequence[PageKey]) -> list[bool]:
        """Renew the pages that were not asked about lately; which are not there, where that showed.

        One that is not there is said so once: a server that takes no pages is not sent them with
        each use.
        """
        now_s = self._clock()
        oldest_s = now_s - self._renew_every_s
        due = [key for key in keys if self._renewed_s.get(key, oldest_s) <= oldest_s]
        due = due[:_MAX_RENEWED]
        here, _ = self._renew(due, now_s + self._batch_deadline_s)
        return [here.get(key, True) for key in keys]

    def clear(self) -> None:
        """Delete every page made with this secret, other servers' too, within half a minute.

        Raises `ConnectionError` where the server does not answer, refuses, or needs longer.
        """
        end_s = self._clock() + _CLEAR_S
        self._renewed_s.clear()  # what is used again is asked about at once
        cursor = b"0"
        while self._clock() < end_s:
            scan = (b"SCAN", cursor, b"MATCH", self._seal.prefix + b"*", b"COUNT", 1000)
            replies, trouble = self._exchange([scan], _COMMAND_BYTES * 1000, end_s)
            match replies:
                case [[bytes(cursor), list(names)]]:
                    unlinks = [(b"UNLINK", name) for name in names]
                    replies, trouble = self._exchange(unlinks, 0, end_s)
                    refused = [reply.message for reply in replies if isinstance(reply, Refusal)]
                case _:
                    refused = [f"{replies!r:.100}"]
            if trouble or refused:
                raise ConnectionError(f"{self._link.address} keeps pages: {trouble or refused[0]}")
            if cursor == b"0":
                return
        raise ConnectionError(f"{self._link.address} keeps pages: {_CLEAR_S} s were not enough")

    def evicted(self, keys: Sequence[PageKey]) -> list[Evicted | None]:
        """Nothing: what leaves, and why, only the server knows."""
        return [None] * len(keys)

    def stats(self) -> LevelStats:
        """Totals; how much the server holds only it knows."""
        return self._counters.stats(None, None, None, {})

    def close(self) -> None:
        """Drop the connections. Idempotent."""
        self._link.close()

    def _exchange(
        self, commands: Sequence[Command], num_bytes: int, end_s: float
    ) -> tuple[list[object], _Trouble | None]:
        """The replies that arrived in time, and what became of the others."""
        if not commands:
            return [], None
        deadline_s = min(self._batch_deadline_s, end_s - self._clock())
        if deadline_s <= 0:
            return [], "late"
        if not self._budget.take(num_bytes):
            return [], "refused"
        try:
            if not self._breaker.allows():
                return [], "refused"
            replies, trouble = self._link.call(commands, deadline_s)
        finally:
            self._budget.give(num_bytes)
        if trouble is None:
            self._breaker.succeeded()
            return replies, None
        self._breaker.failed()
        self._failed(trouble)
        return replies, "late"

    def _note_missing(self, keys: Sequence[PageKey], replies: Sequence[object]) -> None:
        if len(self._missing_until_s) > _MAX_REMEMBERED:
            self._missing_until_s.clear()
        until_s = self._clock() + _MISS_LASTS_S
        for key, reply in zip(keys, replies, strict=False):
            if reply is None:
                self._missing_until_s[key] = until_s

    def _failed(self, trouble: str) -> None:
        self._counters.add(failures=1)
        self._complaints.warn("the remote cache fails", f"{self._link.address}: {trouble}")

    def _next_batch(self) -> tuple[int, int]:
        """How many pages to ask for at once, and the bytes to reckon for them."""
        if self._value_bytes is None:
            return _FIRST_BATCH_PAGES, self._batch_bytes
        num_pages = min(_MAX_BATCH_PAGES, max(1, self._batch_bytes // self._value_bytes))
        return num_pages, num_pages * self._value_bytes

    def _open(self, keys: Sequence[PageKey], replies: Sequence[object]) -> list[StoredPage | None]:
        """The page that each reply holds, if it does."""
        sealed = [self._unsealed(key, reply) for key, reply in zip(keys, replies, strict=False)]
        pages = iter(
            self._codec.decode_many(
                [
                    (value, key)
                    for key, value in zip(keys, sealed, strict=False)
                    if value is not None
                ]
            )
        )
        found: list[StoredPage | None] = []
        for key, value in zip(keys, sealed, strict=False):
            page = None if value is None else next(pages)
            if isinstance(page, BadValue):
                self._note_broken(key, page)
                page = None
            elif value is not None:
                self._value_bytes = max(self._value_bytes or 0, _MAC_BYTES + len(value))
            found.append(page)
        return found

    def _unsealed(self, key: PageKey, reply: object) -> memoryview | None:
        """The value that a reply holds, if it is one made with this secret."""
        if reply is None:
            return None
        if isinstance(reply, Refusal):
            self._failed(reply.message)
            return None
        try:
            if not isinstance(reply, bytes):
                raise BadValue(f"the server answered {reply!r:.100}")
            return self._seal.open(reply)
        except BadValue as error:
            self._note_broken(key, error)
            return None

    def _note_broken(self, key: PageKey, error: BadValue) -> None:
        if len(self._broken) < _MAX_REMEMBERED:
            self._broken.add(key)
        self._counters.add(corrupt=1)
        self._complaints.warn("a page is corrupt", f"{self._link.address}: {error}")

    def _renew(
        self, keys: Sequence[PageKey], end_s: float
    ) -> tuple[dict[PageKey, bool], _Trouble | None]:
        """Whether pages are there, of those of which that shows; those that are live on."""
        asked = [key for key in keys if key not in self._broken]
        commands = [(b"PEXPIRE", self._seal.name(key), self._ttl_ms) for key in asked]
        replies, trouble = self._exchange(commands, _COMMAND_BYTES * len(asked), end_s)
        here: dict[PageKey, bool] = {}
        for key, reply in zip(asked, replies, strict=False):
            if isinstance(reply, Refusal):
                self._failed(reply.message)
            else:
                here[key] = reply == 1
        if trouble is None:
            here.update((key, False) for key in keys if key in self._broken)
        # Refused ones too. What was not answered at all may be asked again: the breaker bounds it.
        self._note_renewed([*here, *asked[: len(replies)]])
        return here, trouble

    def _note_renewed(self, keys: Collection[PageKey]) -> None:
        if len(self._renewed_s) + len(keys) > _MAX_REMEMBERED:
            self._renewed_s.clear()
        self._renewed_s.update(dict.fromkeys(keys, self._clock()))

    def _send(
        self, pages: Sequence[StoredPage], values: Sequence[bytes], end_s: float
    ) -> tuple[list[object], _Trouble | None]:
        """One batch of new pages; the replies to those that were answered in time."""
        commands = [
            (b"SET", self._seal.name(page.key), value, b"PX", self._ttl_ms)
            for page, value in zip(pages, values, strict=True)
        ]
        replies, trouble = self._exchange(commands, sum(map(len, values)), end_s)
        taken = [i for i, reply in enumerate(replies) if reply == b"OK"]
        for reply in replies:
            if isinstance(reply, Refusal):
                self._failed(reply.message)
        self._note_renewed([pages[i].key for i in taken])
        for i in taken:
            self._broken.discard(pages[i].key)
            self._missing_until_s.pop(pages[i].key, None)
        self._counters.add(
            stored=len(taken),
            refused=len(replies) - len(taken),
            stored_payload_bytes=sum(len(pages[i].payload) for i in taken),
            written_bytes=sum(len(values[i]) for i in taken),
        )
        return replies, trouble

    def _batches(
        self, pages: Sequence[StoredPage]
    ) -> Iterator[tuple[list[StoredPage], list[bytes]]]:
        """Pages with their sealed values, in groups of about a batch's bytes."""
        batch: list[StoredPage] = []
        values: list[bytes] = []
        num_bytes = 0
        for page in pages:
            value = self._seal.close(self._codec.encode(page))
            self._value_bytes = max(self._value_bytes or 0, len(value))
            if values and num_bytes + len(value) > self._batch_bytes:
                yield batch, values
                batch, values, num_bytes = [], [], 0
            batch.append(page)
            values.append(value)
            num_bytes += len(value)
        if values:
            yield batch, values
