"""Which tenant pays for which page, where tenants have a bound on theirs.

A page is paid for by whom it was taken for, from then until it is free or taken for somebody else,
whoever else uses it meanwhile. Tenants without a bound are not counted, and cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvpaging.base.ids import PageId
from kvpaging.cache.eviction.leaf_queue import LeafQueue


class Budget:
    """One tenant's pages and their bound."""

    __slots__ = ("cached", "max_pages", "num_pages")

    def __init__(self, max_pages: int):
        self.max_pages = max_pages
        self.num_pages = 0
        """Pages that it pays for: in use and cached."""
        self.cached = LeafQueue()
        """Its cached ones, the least recently used first."""

    def num_over(self, num_new_pages: int) -> int:
        """Pages beyond the bound that so many new ones would make; 0 or more."""
        return max(0, self.num_pages + num_new_pages - self.max_pages)


class Budgets:
    """All tenants that have a bound."""

    def __init__(self) -> None:
        self._by_tenant: dict[str, Budget] = {}
        self._payers: dict[PageId, Budget] = {}

    def __bool__(self) -> bool:
        return bool(self._payers)

    def of(self, tenant: str, max_pages: int | None) -> Budget | None:
        """The tenant's, with this bound from now on; `None` where there is none."""
        if max_pages is None:
            return None
        budget = self._by_tenant.get(tenant)
        if budget is None:
            budget = self._by_tenant[tenant] = Budget(max_pages)
        budget.max_pages = max_pages
        return budget

    def num_pages(self) -> dict[str, int]:
        """What each tenant pays for."""
        return {tenant: budget.num_pages for tenant, budget in self._by_tenant.items()}

    def charge(self, page_ids: Iterable[PageId], budget: Budget) -> None:
        """These were taken for the tenant just now."""
        for page_id in page_ids:
            self._payers[page_id] = budget
            budget.num_pages += 1

    def clear(self, page_id: PageId) -> None:
        """The page holds nothing any more; it is not cached."""
        budget = self._payers.pop(page_id, None)
        if budget is not None:
            budget.num_pages -= 1

    def keep(self, page_id: PageId, priority: int, *, is_leaf: bool) -> None:
        """The page became cached."""
        budget = self._payers.get(page_id)
        if budget is not None:
            budget.cached.push(page_id, priority, is_leaf=is_leaf)

    def expose(self, page_id: PageId) -> None:
        """This cached page is a leaf now."""
        budget = self._payers.get(page_id)
        if budget is not None:
            budget.cached.expose(page_id)

    def revive(self, page_id: PageId) -> None:
        """The page is no longer cached."""
        budget = self._payers.get(page_id)
        if budget is not None:
            budget.cached.remove(page_id)
