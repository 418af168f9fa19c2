"""The page store (index, allocator, LRU) beside simpler and other stores: store, look up, evict.

Each store holds `--keys` pages by their 32-byte keys:

    kvpaging     `CacheManager`: sequences of 32 pages, published, released; look-ups are matches of
                 whole sequences that compare tokens too; storing as many again evicts all the old
    dict + list  what tutorials show: a dict, and a list in order of use that is searched each time
    OrderedDict  the same idea with an order that is O(1)
    cachetools   `LRUCache` (pip install cachetools)
    redis        a server at --redis, where one answers (pip install redis); pipelines of 32 keys

Look-ups come in random order. `dict + list` is quadratic and left out above 20,000 keys. Prints
microseconds a key, the least of five runs up to 100,000 keys. Nothing moves the pages' bytes: this
is bookkeeping only.

    python benchmarks/page_store.py [--keys 5000] [--redis redis://localhost] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from kvpaging.base.ids import PageKey
from kvpaging.cache.cache_manager import CacheManager
from kvpaging.cache.prefix_key import ChainLink, PrefixChain

SEQUENCE = 32
MAX_QUADRATIC = 20_000


def sequences(first: int, count: int) -> list[list[ChainLink]]:
    """`count` pages from number `first` on, as chains of `SEQUENCE` pages."""
    links = [
        ChainLink(
            PageKey(hashlib.sha256(i.to_bytes(8, "little")).digest()), i.to_bytes(64, "little")
        )
        for i in range(first, first + count)
    ]
    return [links[i : i + SEQUENCE] for i in range(0, count, SEQUENCE)]


class _Store(Protocol):
    """Bounded, and evicts what was used longest ago."""

    def store(self, links: Sequence[ChainLink]) -> None: ...

    def look_up(self, links: Sequence[ChainLink]) -> int: ...


class _Pages:
    """The page store that serves."""

    def __init__(self, capacity: int):
        self._cache = CacheManager(capacity, 1)

    def _chain(self, links: Sequence[ChainLink]) -> PrefixChain:
        return PrefixChain.of_links(self._cache.root, list(links), 1)

    def store(self, links: Sequence[ChainLink]) -> None:
        """As a sequence that was computed and ended."""
        lease = self._cache.reserve([], len(links))
        chain = self._chain(links)
        self._cache.commit(lease, chain, len(links))
        self._cache.prove(lease, chain)
        self._cache.release(lease)

    def look_up(self, links: Sequence[ChainLink]) -> int:
        """As a sequence that arrives, finds everything, and ends."""
        matched = self._cache.match(self._chain(links), len(links) + 1)
        self._cache.release(self._cache.reserve(matched, len(links)))
        return len(matched)


class _DictAndList:
    """The naive one: each use searches the list."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._values: dict[bytes, bytes] = {}
        self._order: list[bytes] = []

    def store(self, links: Sequence[ChainLink]) -> None:
        for key, tokens in links:
            if len(self._values) >= self._capacity:
                del self._values[self._order.pop(0)]
            self._values[key] = tokens
            self._order.append(key)

    def look_up(self, links: Sequence[ChainLink]) -> int:
        for key, _ in links:
            if key in self._values:
                self._order.remove(key)
                self._order.append(key)
        return sum(key in self._values for key, _ in links)


class _Ordered:
    """A dict that remembers an order."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._values: OrderedDict[bytes, bytes] = OrderedDict()

    def store(self, links: Sequence[ChainLink]) -> None:
        for key, tokens in links:
            if len(self._values) >= self._capacity:
                self._values.popitem(last=False)
            self._values[key] = tokens

    def look_up(self, links: Sequence[ChainLink]) -> int:
        found = 0
        for key, _ in links:
            if key in self._values:
                self._values.move_to_end(key)
                found += 1
        return found


class _CacheTools:
    """`cachetools.LRUCache`."""

    def __init__(self, capacity: int):
        import cachetools

        self._values: MutableMapping[bytes, bytes] = cachetools.LRUCache(capacity)

    def store(self, links: Sequence[ChainLink]) -> None:
        for key, tokens in links:
            self._values[key] = tokens

    def look_up(self, links: Sequence[ChainLink]) -> int:
        return sum(self._values.get(key) is not None for key, _ in links)


class _Redis:
    """A Redis server of its own bound; keys are removed by us, since its eviction is by bytes."""

    def __init__(self, capacity: int, url: str):
        import redis

        self._server = redis.Redis.from_url(url, socket_timeout=5)
        self._server.ping()
        self._capacity = capacity
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def store(self, links: Sequence[ChainLink]) -> None:
        with self._server.pipeline(transaction=False) as pipe:
            for key, tokens in links:
                if len(self._order) >= self._capacity:
                    pipe.delete(self._order.popitem(last=False)[0])
                pipe.set(key, tokens, ex=600)
                self._order[key] = None
            pipe.execute()

    def look_up(self, links: Sequence[ChainLink]) -> int:
        values = self._server.mget([key for key, _ in links])
        return sum(value is not None for value in values)

    def close(self) -> None:
        """Leave nothing behind."""
        keys = list(self._order)
        for i in range(0, len(keys), 1000):
            self._server.delete(*keys[i : i + 1000])


@dataclass(frozen=True)
class Row:
    """Microseconds a key."""

    store_name: str
    num_keys: int
    store_us: float
    look_up_us: float
    evict_us: float
    """Storing another key in place of the one used longest ago."""


def _timed(action: Callable[[Sequence[ChainLink]], object], work: list[list[ChainLink]]) -> float:
    started = time.perf_counter()
    for links in work:
        action(links)
    return (time.perf_counter() - started) * 1e6 / sum(map(len, work))


def measure(name: str, store: _Store, num_keys: int) -> Row:
    """Fill the store, find all of it, then replace all of it; each answer is checked."""
    old, new = sequences(0, num_keys), sequences(num_keys, num_keys)
    store_us = _timed(store.store, old)
    look_up_us = _timed(store.look_up, random.Random(0).sample(old, len(old)))
    assert store.look_up(old[0]) == len(old[0])
    evict_us = _timed(store.store, new)
    assert store.look_up(new[-1]) == len(new[-1])
    assert store.look_up(old[1]) == 0
    return Row(name, num_keys, store_us, look_up_us, evict_us)


def best(name: str, make: Callable[[int], _Store], num_keys: int) -> Row:
    """The least of several runs over stores of their own: the rest is other people's work."""
    runs = []
    for _ in range(1 if num_keys > 100_000 else 5):
        store = make(num_keys)
        runs.append(measure(name, store, num_keys))
        if isinstance(store, _Redis):
            store.close()
    return Row(
        name,
        num_keys,
        min(run.store_us for run in runs),
        min(run.look_up_us for run in runs),
        min(run.evict_us for run in runs),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, action="append")
    parser.add_argument("--redis", metavar="URL")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    makers: dict[str, Callable[[int], _Store]] = {
        "kvpaging": _Pages,
        "dict + list": _DictAndList,
        "OrderedDict": _Ordered,
        "cachetools": _CacheTools,
    }
    if options.redis:
        makers["redis"] = lambda capacity: _Redis(capacity, options.redis)
    rows = []
    for num_keys in options.keys or (5_000, 1_000_000):
        for name, make in makers.items():
            if name == "dict + list" and num_keys > MAX_QUADRATIC:
                continue
            try:
                rows.append(best(name, make, num_keys))
            except ImportError as error:
                print(f"# {name} is left out: {error}")
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"{'store':<12} {'keys':>9} {'store us':>9} {'look up us':>10} {'evict us':>9}")
    for row in rows:
        print(
            f"{row.store_name:<12} {row.num_keys:9} {row.store_us:9.2f} {row.look_up_us:10.2f} "
            f"{row.evict_us:9.2f}"
        )


if __name__ == "__main__":
    main()
