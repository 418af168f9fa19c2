"""How long a request's pages shall stay: what its sender asks for, as data."""

from __future__ import annotations

import msgspec

MAX_TTL_S = 366 * 86_400.0

MAX_RETENTION_PRIORITY = 100
"""Retention priorities run from `-MAX_RETENTION_PRIORITY` to `MAX_RETENTION_PRIORITY`."""


class Retention(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What shall become of a request's full pages when it has ended.

    As it is, they are cached like any others. A page that several requests use gets the best of
    what they ask for: it stays as long as the one that wants it longest.
    """

    store: bool = True
    """False: its pages are free when it ends, nobody else finds them, and no level gets them."""
    pin: bool = False
    """The prompt's pages are not evicted, until the pin is given up or its time is over."""
    ttl_s: float | None = None
    """So long after their last use its pages leave; such pages go to no lower level."""
    priority: int = 0
    """Pages of a lower priority are evicted first, whatever the policy says."""


AS_IT_IS = Retention()
"""To be compared by value: one that crossed the process line is another object."""
NOT_AT_ALL = Retention(store=False)
