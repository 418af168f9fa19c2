"""Names for the numbers that travel through the engine, so that they cannot be mixed up."""

from __future__ import annotations

from typing import Final, NewType

RequestId = NewType("RequestId", str)
SeqId = NewType("SeqId", int)
PageId = NewType("PageId", int)
StepId = NewType("StepId", int)
TokenId = NewType("TokenId", int)

PageKey = NewType("PageKey", bytes)
"""SHA-256 of a page's whole prefix; see `kvpaging.cache.prefix_key`."""

SCRATCH_PAGE: Final = PageId(0)
"""Never handed out: padding may write there."""
