"""What one run of a trace came to."""

from __future__ import annotations

import msgspec


class Latencies(msgspec.Struct, frozen=True):
    """Of simulated time, in seconds."""

    ttft_p50_s: float
    """From arrival to the first token."""
    ttft_p99_s: float
    simulated_s: float
    """From the first arrival to the last token."""


class Outcome(msgspec.Struct, frozen=True):
    """One policy at one capacity over one trace."""

    policy: str
    capacity_pages: int | None
    """`None`: nothing was ever evicted."""
    page_size: int
    mode: str
    """`cache`, `blocks` (cache mode without leaf order) or `full`."""
    num_requests: int
    num_pages: int
    """Of all prompts, hits and misses."""
    num_hit_pages: int
    """Found from the prompt's first page on, without a gap."""
    num_tokens: int
    num_hit_tokens: int
    num_evicted_pages: int
    seconds: float
    """What the run took here."""
    num_rejected: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_output_tokens: int = 0
    num_level_hit_pages: dict[str, int] = {}
    """Of the levels below the device, where there are any; loaded pages count among the hits."""
    latencies: Latencies | None = None

    @property
    def hit_ratio_pages(self) -> float:
        """Of all pages of all prompts."""
        return self.num_hit_pages / self.num_pages if self.num_pages else 0.0

    @property
    def hit_ratio_tokens(self) -> float:
        """Of all prompt tokens."""
        return self.num_hit_tokens / self.num_tokens if self.num_tokens else 0.0

    def as_json(self) -> dict[str, object]:
        """All fields and both ratios."""
        fields: dict[str, object] = msgspec.to_builtins(self)
        return fields | {
            "hit_ratio_pages": round(self.hit_ratio_pages, 6),
            "hit_ratio_tokens": round(self.hit_ratio_tokens, 6),
        }
