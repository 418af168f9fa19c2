"""What an engine is asked for, and what it resolved to.

`EngineOptions` may leave choices open (`None`); `kvpaging.engine.resolve` closes them once, at
start, into an `EngineConfig` that nothing edits later.
"""

from __future__ import annotations

import msgspec


class SchedulerConfig(msgspec.Struct, frozen=True):
    """The bounds that policy works within. No model, no device."""

    num_pages: int
    """Pages that can be handed out; the scratch page is not among them."""
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    """Tokens of one sequence, prompt and output together."""
    max_num_waiting: int
    """Requests that may wait; one more is refused as overloaded."""
    prefix_cache: bool = True
    eviction_policy: str = "lru"
    """Which cached page goes first; a name of `kvpaging.cache.eviction.names`."""
    max_pinned_pages: int = 0
    """Pages that pins may hold together. The longest request must fit beside them."""


class EngineOptions(msgspec.Struct, frozen=True):
    """What the operator asked for. `None` means: decide at start, and say what was decided."""

    model: str
    """A checkpoint directory, or a hub id."""
    device: str | None = None
    """`cpu`, `cuda` or `cuda:N`."""
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    """What KV pages hold: `int8` or `fp8_e4m3`; the model's dtype if not given."""
    quantization: str | None = None
    """What linears' weights become as they are loaded: `int8`; the model's dtype if not given."""
    page_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    max_num_waiting: int = 1024
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    threads: int | None = None
    kernels: str | None = None
    """`native`, `triton` or `torch`; for tests and for finding faults."""
    prefix_cache: bool = True
    async_scheduling: bool | None = None
    """Plan the next step while one computes. `None`: on a GPU."""
    enforce_eager: bool = False
    """Launch every kernel of every step; else decode steps that were captured are replayed."""
    exact: bool = True
    """False lets a GPU's path trade equal bits for speed; a CPU's has no need to."""
    host_cache_bytes: int = 0
    """Memory for pages that left the device; 0: none."""
    host_cache_min_uses: int = 0
    """Uses after which a page is written there; 0: when it leaves the device."""
    disk_cache_dir: str | None = None
    """Where pages are written as they are computed, and found again after a restart."""
    disk_cache_bytes: int = 16 * 2**30
    disk_cache_min_uses: int = 1
    disk_cache_compress: bool = False
    remote_cache_url: str | None = None
    """A server that speaks the Redis protocol, for pages that several engines share."""
    remote_cache_min_uses: int = 1
    remote_cache_compress: bool = True
    remote_cache_deadline_s: float = 0.2
    """For one exchange with the server; what did not arrive by then is computed."""
    remote_cache_ttl_s: float = 7 * 24 * 3600.0
    """The server forgets a page so long after it was stored last."""
    cache_secret_file: str | None = None
    """What seals pages on the remote server; the same for all engines that share them."""
    eviction_policy: str = "lru"
    max_pinned_ratio: float = 0.25
    """Share of the pool that pins may hold, where the longest request fits beside them."""
    record: str | None = None
    """A file to write what each step was given to, for `kvpaging replay`."""


class EngineConfig(msgspec.Struct, frozen=True):
    """What an engine runs with."""

    model_dir: str
    architecture: str
    device: str
    dtype: str
    kv_cache_dtype: str
    threads: int
    kernels: str
    """The kernel path in words, as `kvpaging doctor` prints it."""
    exact: bool
    """Cached equals computed bit for bit on this path."""
    kv_cache_bytes: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    scheduler: SchedulerConfig
    quantization: str | None = None
    """What linears' weights became: `int8`, or nothing."""
    async_scheduling: bool = False
    """The next step is planned while one computes: two plans are held."""
    numerics_identity: bytes = b""
    """What a page's bits depend on besides its tokens: the root of every prefix key."""
    decisions: tuple[str, ...] = ()
    """One line for every choice that was left open, with its reason."""
