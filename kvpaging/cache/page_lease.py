"""Pages come with the right to give them back, once."""

from __future__ import annotations

from dataclasses import dataclass

from kvpaging.base.ids import PageId
from kvpaging.cache.budgets import Budget
from kvpaging.cache.retention import AS_IT_IS, Retention


@dataclass(slots=True, eq=False)
class PageLease:
    """One sequence's page table: the right to read its pages and to write those not yet full.

    Append-only; only the `CacheManager` changes it. Token i sits at
    `pages[i // page_size] * page_size + i % page_size`.
    """

    pages: list[PageId]
    num_cached_tokens: int
    """Tokens whose keys and values were already there: they need not be computed."""
    num_published: int
    """How many of the first pages are in the index."""
    num_proven: int = 0
    """How many of the first pages some sequence read and sampled finite logits from."""
    is_live: bool = True
    retention: Retention = AS_IT_IS
    is_private: bool = False
    """The cache was emptied meanwhile: none of its pages is found by others from then on."""
    budget: Budget | None = None
    """Who pays for the pages that are taken for it; `None`: a tenant without a bound."""
