"""Policies by name, as operators and replays ask for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvpaging.cache.eviction.arc import AdaptiveReplacement
from kvpaging.cache.eviction.lru import LeastRecentlyUsed
from kvpaging.cache.eviction.policy import EvictionPolicy
from kvpaging.cache.eviction.random_choice import RandomChoice
from kvpaging.cache.eviction.ranked import FirstInFirstOut, LeastFrequentlyUsed
from kvpaging.cache.eviction.s3fifo import S3Fifo

DEFAULT_POLICY: Final = "lru"
POLICIES: Final[dict[str, Callable[[int], EvictionPolicy]]] = {
    "lru": lambda _: LeastRecentlyUsed(),
    "fifo": lambda _: FirstInFirstOut(),
    "lfu": lambda _: LeastFrequentlyUsed(ageing=False),
    "lfu-ageing": lambda _: LeastFrequentlyUsed(ageing=True),
    "arc": AdaptiveReplacement,
    "s3-fifo": S3Fifo,
    "random": lambda _: RandomChoice(),
}
"""Each makes a policy for a cache of so many pages."""
