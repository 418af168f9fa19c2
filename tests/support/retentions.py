"""What requests may want of the cache, to choose from by lot."""

from __future__ import annotations

from kvpaging.cache.retention import AS_IT_IS, Retention

RETENTIONS = [
    AS_IT_IS,
    AS_IT_IS,
    Retention(store=False),
    Retention(pin=True),
    Retention(pin=True, ttl_s=5.0, priority=5),
    Retention(ttl_s=3.0),
    Retention(priority=-2),
]
