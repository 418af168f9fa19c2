"""From options to a running executor: every choice that was left open is made here, once.

The order is: what the checkpoint is, what computes it, in which dtype, how many pages there is room
for, how long a sequence may be; then the weights are loaded. Each choice leaves a line in
`EngineConfig.decisions`.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import torch

import kernels
from kernels import registry
from kernels.errors import KernelUnavailableError
from kernels.ops import Ops
from kernels.splits import part_bytes
from kvpaging import execution
from kvpaging.base.config import EngineConfig, EngineOptions, SchedulerConfig
from kvpaging.base.errors import ConfigError
from kvpaging.base.ids import PageKey
from kvpaging.base.kv_spec import DTYPE_BYTES, QUANTISED_BYTES, KVSpec
from kvpaging.base.secret_file import read_secret
from kvpaging.cache.eviction.names import POLICIES
from kvpaging.cache.prefix_key import root_key
from kvpaging.execution.checkpoint import resolve_checkpoint
from kvpaging.execution.decode_graphs import (
    EXACT,
    PADDED,
    kept_bytes,
    padded_size,
    padded_width,
)
from kvpaging.execution.kv_pool import TORCH_DTYPES, KVPool
from kvpaging.execution.local_executor import LocalExecutor
from kvpaging.execution.memory import available_bytes
from kvpaging.execution.model_config import ModelConfig, read_model_config
from kvpaging.execution.models.registry import model_class
from kvpaging.execution.page_mover import LevelSetting, PageMover
from kvpaging.execution.rope import inverse_frequencies
from kvpaging.execution.transfer import use_device
from kvpaging.execution.weights import Checkpoint, OnProgress, Parameters
from kvpaging.levels.disk import DiskLevel
from kvpaging.levels.host import HostLevel
from kvpaging.levels.level import Level
from kvpaging.levels.overflow import Overflow

GIB: Final = 1024**3
CPU_KV_SHARE: Final = 4
"""On a CPU the pool takes one part in so many of what is free, ..."""
CPU_KV_LIMIT_BYTES: Final = 4 * GIB
"""... and at most this."""
REMOTE_EXCHANGES: Final = 2
"""The deadlines that 32 pages of a load from a remote server have."""
_FP8_DEVICES: Final = ". fp8_e4m3 needs an NVIDIA GPU of compute capability 8.9 or later"
QUANTIZATIONS: Final = ("int8",)
DEFAULT_BATCHED_TOKENS: Final = {"cpu": 512, "cuda": 8192}


def load_executor(
    options: EngineOptions, on_progress: OnProgress | None = None
) -> tuple[EngineConfig, LocalExecutor]:
    """Load the checkpoint that `options` name and make what runs it.

    `on_progress` hears the stage, the bytes done and the bytes in all. Sets torch's thread count,
    and the GPU of the calling thread where there is one.
    Raises `ConfigError` when the checkpoint or an option can't be used.
    """
    _check(options)
    model_dir = resolve_checkpoint(options.model)
    model_config = read_model_config(model_dir)
    family = model_class(model_config)
    decisions: list[str] = []
    device = _device(options, decisions)
    use_device(device)
    threads = _threads(options, decisions)
    ops = _ops(options, device, threads)
    dtype = _dtype(options, model_config, device, ops, decisions)
    checkpoint = Checkpoint(model_dir)
    weight_bytes = _weight_bytes(checkpoint, model_config, dtype, options.quantization)
    spec = KVSpec(
        num_layers=model_config.num_layers,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        page_size=_page_size(options),
        dtype=_kv_cache_dtype(options, dtype, device, ops),
    )
    max_num_batched_tokens = _max_num_batched_tokens(options, device, decisions)
    async_scheduling = _async_scheduling(options, device, decisions)
    memory_bytes = _kv_memory_bytes(
        options, model_config, spec, device, dtype, weight_bytes, max_num_batched_tokens, decisions
    )
    num_pages, max_model_len = _lengths(options, model_config, spec, memory_bytes, decisions)

    parameters = Parameters(
        checkpoint, ops, device, TORCH_DTYPES[dtype], on_progress, options.quantization
    )
    with torch.inference_mode():
        model = family(model_config, parameters, max_model_len)
        fingerprint = parameters.finish(model.ignored_tensors())
        pool = KVPool(spec, num_pages, device)
    identity = _numerics_identity(
        fingerprint, model_config, (dtype, options.quantization), spec, ops, max_model_len
    )
    levels = _levels(options, identity, spec.item_bytes, decisions)
    config = EngineConfig(
        model_dir=str(model_dir),
        architecture=model_config.architecture,
        device=str(device),
        dtype=dtype,
        kv_cache_dtype=spec.dtype,
        quantization=options.quantization,
        threads=threads,
        kernels=ops.name,
        exact=ops.exact,
        kv_cache_bytes=pool.num_bytes,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
        scheduler=SchedulerConfig(
            num_pages=num_pages,
            page_size=spec.page_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_num_waiting=options.max_num_waiting,
            prefix_cache=options.prefix_cache,
            eviction_policy=options.eviction_policy,
            max_pinned_pages=_max_pinned_pages(
                options, num_pages, spec.pages_for(max_model_len), decisions
            ),
        ),
        async_scheduling=async_scheduling,
        numerics_identity=identity,
        decisions=tuple(decisions),
    )
    mover = PageMover(pool, ops, levels) if levels else None
    executor = LocalExecutor(
        model,
        pool,
        ops,
        model_config.eos_token_ids,
        mover,
        async_scheduling=async_scheduling,
        capture=None if options.enforce_eager else ops.capture,
        sizes=EXACT if device.type == "cpu" else PADDED,
    )
    return config, executor


def _check(options: EngineOptions) -> None:
    """What can be refused before anything is loaded. Raises ConfigError."""
    if options.max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs: must be at least 1, is {options.max_num_seqs}")
    if not 0 <= options.max_pinned_ratio <= 1:
        raise ConfigError(f"max_pinned_ratio: must be in 0..1, is {options.max_pinned_ratio}")
    if options.max_num_waiting < 1:
        raise ConfigError(f"max_num_waiting: must be at least 1, is {options.max_num_waiting}")
    if not 0 < options.gpu_memory_utilization <= 1:
        raise ConfigError(
            "gpu_memory_utilization: must be above 0 and at most 1, is "
            f"{options.gpu_memory_utilization}"
        )
    if options.quantization not in (None, *QUANTIZATIONS):
        raise ConfigError(
            f"quantization: {options.quantization!r} is none of {', '.join(QUANTIZATIONS)}"
        )
    if options.eviction_policy not in POLICIES:
        raise ConfigError(
            f"eviction_policy: {options.eviction_policy!r} is none of {', '.join(POLICIES)}"
        )
    tokens = options.max_num_batched_tokens
    if tokens is not None and tokens < options.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens: {tokens} is below max_num_seqs ({options.max_num_seqs}); "
            "each running sequence needs one a step"
        )


def _device(options: EngineOptions, decisions: list[str]) -> torch.device:
    if options.device is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        reason = "torch sees a GPU" if name == "cuda" else "torch sees no GPU"
        decisions.append(f"device {name}: {reason}")
        return torch.device(name, 0) if name == "cuda" else torch.device(name)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in DEFAULT_BATCHED_TOKENS:
        raise ConfigError(f"device: {options.device!r} is none of cpu, cuda, cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device: {options.device!r}, and torch sees no GPU")
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"device: {options.device!r}, and torch sees {torch.cuda.device_count()} GPUs"
            )
    return device


def _threads(options: EngineOptions, decisions: list[str]) -> int:
    threads = options.threads
    if threads is None:
        threads = len(os.sched_getaffinity(0))
        decisions.append(f"threads {threads}: the cores that this process may use")
    if threads < 1:
        raise ConfigError(f"threads: must be at least 1, is {threads}")
    return threads


def _ops(options: EngineOptions, device: torch.device, threads: int) -> Ops:
    """The path that computes, and torch's own thread count beside it."""
    if options.kernels not in (None, "native", "triton", "torch"):
        raise ConfigError(f"kernels: {options.kernels!r} is none of native, triton, torch")
    try:
        ops = registry.select(
            device,
            prefer=options.kernels,  # type: ignore[arg-type]  # checked above
            threads=threads,
            exact=options.exact,
        )
    except KernelUnavailableError as error:
        raise ConfigError(f"kernels: {options.kernels} can't run here: {error}") from error
    # The native path has threads of its own, and a second pool would only take cores from it:
    # what is left to torch there is small.
    torch.set_num_threads(1 if ops.name.startswith("native") else threads)
    return ops


def _page_size(options: EngineOptions) -> int:
    if options.page_size < 1:
        raise ConfigError(f"page_size: must be at least 1 token, is {options.page_size}")
    return options.page_size


def _dtype(
    options: EngineOptions,
    model: ModelConfig,
    device: torch.device,
    ops: Ops,
    decisions: list[str],
) -> str:
    if options.dtype is not None:
        if options.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype: {options.dtype!r} is none of {', '.join(DTYPE_BYTES)}")
        return options.dtype
    if model.dtype == "float32" or device.type == "cuda" or _is_fast(model.dtype, ops):
        decisions.append(f"dtype {model.dtype}: the checkpoint's")
        return model.dtype
    decisions.append(f"dtype float32: {ops.name} computes {model.dtype} slowly or not at all")
    return "float32"


def _is_fast(dtype: str, ops: Ops) -> bool:
    """On a CPU: whether the path has instructions for the dtype."""
    return dtype == "bfloat16" and any(name in ops.name for name in ("bf16", "amx"))


def _kv_cache_dtype(options: EngineOptions, dtype: str, device: torch.device, ops: Ops) -> str:
    """What pages hold: the model's dtype, or a quantised one that the path computes with."""
    wanted = options.kv_cache_dtype
    if wanted is None or wanted == dtype:
        return dtype
    usable = [name for name in QUANTISED_BYTES if TORCH_DTYPES[name] in ops.page_dtypes]
    if wanted in DTYPE_BYTES:
        raise ConfigError(
            f"kv_cache_dtype: {wanted}, and the model computes in {dtype}; pages hold what it "
            f"computes in, or {' or '.join(QUANTISED_BYTES)}"
        )
    if wanted not in QUANTISED_BYTES:
        names = ", ".join((*DTYPE_BYTES, *QUANTISED_BYTES))
        raise ConfigError(f"kv_cache_dtype: {wanted!r} is none of {names}")
    if wanted not in usable:
        raise ConfigError(
            f"kv_cache_dtype: {ops.name} on {device} does not compute with {wanted}; it does with "
            f"{' and '.join((dtype, *usable))}" + (_FP8_DEVICES if wanted == "fp8_e4m3" else "")
        )
    return wanted


def _weight_bytes(
    checkpoint: Checkpoint, model: ModelConfig, dtype: str, quantization: str | None
) -> int:
    """Of all weights: quantized, all but the embedding are linears' (the rest is small)."""
    if quantization is None:
        return checkpoint.num_parameters * DTYPE_BYTES[dtype]
    embedding = model.vocab_size * model.hidden_size
    return checkpoint.num_parameters - embedding + embedding * DTYPE_BYTES[dtype]


def _max_num_batched_tokens(
    options: EngineOptions, device: torch.device, decisions: list[str]
) -> int:
    if options.max_num_batched_tokens is not None:
        if options.max_num_batched_tokens < 1:
            raise ConfigError(
                f"max_num_batched_tokens: must be at least 1, is {options.max_num_batched_tokens}"
            )
        return options.max_num_batched_tokens
    tokens = max(DEFAULT_BATCHED_TOKENS[device.type], options.max_num_seqs + 1)
    decisions.append(f"max_num_batched_tokens {tokens}: the default on {device.type}")
    return tokens


def _async_scheduling(options: EngineOptions, device: torch.device, decisions: list[str]) -> bool:
    if options.async_scheduling is not None:
        return options.async_scheduling
    if device.type == "cpu":
        decisions.append("async_scheduling off: planning takes a core from what computes")
        return False
    decisions.append(f"async_scheduling on: the host plans while {device.type} computes")
    return True


def _kv_memory_bytes(
    options: EngineOptions,
    model: ModelConfig,
    spec: KVSpec,
    device: torch.device,
    dtype: str,
    weight_bytes: int,
    max_num_batched_tokens: int,
    decisions: list[str],
) -> int:
    """Bytes for the pool, decided before the weights are loaded, with their size taken off."""
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    if device.type == "cpu":
        free = max(0, available_bytes() - weight_bytes)
        memory_bytes = min(free // CPU_KV_SHARE, CPU_KV_LIMIT_BYTES)
        decisions.append(
            f"KV memory {_gib(memory_bytes)}: a quarter of the {_gib(free)} that are free, "
            f"at most {_gib(CPU_KV_LIMIT_BYTES)}"
        )
        return memory_bytes
    free, total = torch.cuda.mem_get_info(device)
    activations = _activation_bytes(model, dtype, options.max_num_seqs, max_num_batched_tokens)
    usable = int(total * options.gpu_memory_utilization)
    left = max(0, usable - (total - free) - weight_bytes - activations)
    row_bytes = model.hidden_size * DTYPE_BYTES[dtype]
    memory_bytes = _pages_beside_tables(left, options, model, spec, row_bytes) * spec.page_bytes
    decisions.append(
        f"KV memory {_gib(memory_bytes)}: {options.gpu_memory_utilization:.0%} of {_gib(total)}, "
        f"less {_gib(total - free)} in use, {_gib(weight_bytes)} of weights, {_gib(activations)} "
        f"to compute in and {_gib(left - memory_bytes)} for parts of attention and captured steps"
    )
    return memory_bytes


def _activation_bytes(
    model: ModelConfig, dtype: str, max_num_seqs: int, max_num_batched_tokens: int
) -> int:
    """What a full step holds at once, on the safe side: the widest layer's tensors and logits."""
    chosen = 1
    inner = model.intermediate_size
    if model.experts is not None:
        chosen = model.experts.num_chosen
        inner = max(inner, chosen * model.experts.intermediate_size)
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_token = 3 * inner + 2 * heads + (4 + 2 * chosen) * model.hidden_size
    logits = 4 * max_num_seqs * model.vocab_size * 4
    captured = PADDED.most  # graphs have memory of their own
    return (max_num_batched_tokens + captured) * per_token * DTYPE_BYTES[dtype] + logits


def _pages_beside_tables(
    left: int, options: EngineOptions, model: ModelConfig, spec: KVSpec, row_bytes: int
) -> int:
    """The most pages that fit into `left` bytes with attention's parts and captured steps.

    Those grow with the longest sequence: one of the model's length, or of all pages.
    `row_bytes`: of one token's hidden states.
    """
    longest = spec.pages_for(options.max_model_len or model.max_model_len)

    def num_bytes(num_pages: int) -> int:
        table = min(num_pages, longest)
        beside = _part_bytes(model, spec, options.max_num_seqs, table)
        if not options.enforce_eager:
            beside += kept_bytes(options.max_num_seqs, table, row_bytes)
        return num_pages * spec.page_bytes + beside

    return bisect_right(range(left // spec.page_bytes + 1), left, lo=1, key=num_bytes) - 1


def _part_bytes(model: ModelConfig, spec: KVSpec, max_num_seqs: int, num_pages: int) -> int:
    """For page tables of so many pages: a step's parts, and those of the largest captured one."""
    heads = (model.num_heads, model.head_dim)
    captured = min(padded_size(max_num_seqs), PADDED.most)
    return part_bytes(max_num_seqs, num_pages * spec.page_size, *heads) + part_bytes(
        captured, padded_width(num_pages) * spec.page_size, *heads
    )


def _lengths(
    options: EngineOptions,
    model: ModelConfig,
    spec: KVSpec,
    memory_bytes: int,
    decisions: list[str],
) -> tuple[int, int]:
    """Pages of the pool, and tokens of the longest sequence."""
    num_pages = memory_bytes // spec.page_bytes - 1  # one is the scratch page
    if num_pages < 1:
        raise ConfigError(
            f"KV memory: {memory_bytes} bytes hold no page of {spec.page_bytes} bytes beside the "
            "scratch page; give more (kv_cache_memory), or free some"
        )
    num_slots = num_pages * spec.page_size
    max_model_len = options.max_model_len
    if max_model_len is None:
        max_model_len = min(model.max_model_len, num_slots)
        reason = "the checkpoint's"
        if max_model_len < model.max_model_len:
            reason = f"what the pool holds, of the checkpoint's {model.max_model_len}"
        decisions.append(f"max_model_len {max_model_len}: {reason}")
    elif not 1 <= max_model_len <= model.max_model_len:
        raise ConfigError(
            f"max_model_len: {max_model_len} is not between 1 and the checkpoint's "
            f"{model.max_model_len}"
        )
    elif max_model_len > num_slots:
        raise ConfigError(
            f"max_model_len: {max_model_len} tokens exceed the pool's {num_slots}; give more KV "
            "memory (kv_cache_memory)"
        )
    # More would never be used: all sequences at their longest.
    useful = options.max_num_seqs * spec.pages_for(max_model_len)
    if options.kv_cache_memory_bytes is None and num_pages > useful:
        num_pages = useful
        decisions.append(
            f"KV pages {num_pages}: {options.max_num_seqs} sequences of {max_model_len} tokens "
            "need no more"
        )
    return num_pages, max_model_len


def _max_pinned_pages(
    options: EngineOptions, num_pages: int, longest: int, decisions: list[str]
) -> int:
    """What pins may hold: an accepted request is answered, so the longest fits beside them."""
    asked, free = int(options.max_pinned_ratio * num_pages), num_pages - longest
    if asked > free:
        decisions.append(
            f"pins may hold {free} KV pages, not {asked}: one request of the model's length "
            f"takes {longest} of {num_pages}; a smaller max_model_len leaves more"
        )
    return min(asked, free)


def _numerics_identity(
    fingerprint: bytes,
    model: ModelConfig,
    numbers: tuple[str, str | None],
    spec: KVSpec,
    ops: Ops,
    max_model_len: int,
) -> bytes:
    """SHA-256 over what a page's bits depend on besides its tokens.

    `numbers`: the dtype that computes, and what the weights became.
    """
    identity = hashlib.sha256(fingerprint + _code())
    if not ops.exact:
        identity.update(f"{torch.get_num_threads()} threads".encode())
    identity.update(msgspec.json.encode((model, numbers, spec, ops.name)))
    for rope in model.ropes:
        frequencies, factor = inverse_frequencies(rope, max_model_len)
        identity.update(frequencies.numpy().tobytes() + repr(factor).encode())
    return identity.digest()


def _levels(
    options: EngineOptions, identity: bytes, item_bytes: int, decisions: list[str]
) -> list[LevelSetting]:
    """The levels below the device, the fastest first. Raises ConfigError."""
    levels: list[LevelSetting] = []
    if options.remote_cache_url is not None:
        remote = _remote(options, _secret(options), root_key(identity), item_bytes)
        deadline_s = REMOTE_EXCHANGES * options.remote_cache_deadline_s
        levels = [LevelSetting(remote, options.remote_cache_min_uses, deadline_s)]
    if options.disk_cache_dir is not None:
        # What was written at its first use is renewed as it leaves the disk.
        overflow = _overflow(levels, max_uses=1)
        disk = DiskLevel(
            Path(options.disk_cache_dir),
            options.disk_cache_bytes,
            root=root_key(identity),
            item_bytes=item_bytes,
            compress=options.disk_cache_compress,
            overflow=overflow,
        )
        decisions.append(
            f"disk cache {options.disk_cache_dir}: {disk.stats().num_pages} pages are there"
        )
        setting = LevelSetting(disk, options.disk_cache_min_uses, 1.0, overflow, disk.other_roots)
        levels = _above(setting, levels)
    if options.host_cache_bytes:
        # On the disk a page that is stored again counts as used, and leaving is no use.
        overflow = _overflow(levels, max_uses=0 if options.disk_cache_dir is not None else 1)
        host = HostLevel(options.host_cache_bytes, overflow=overflow)
        setting = LevelSetting(host, options.host_cache_min_uses, 1.0, overflow)
        levels = _above(setting, levels)
    return levels


def _overflow(levels: Sequence[LevelSetting], max_uses: int) -> Overflow | None:
    """The way into the first of these levels, if it takes pages at so many uses or before."""
    if not levels or levels[0].min_uses is None or levels[0].min_uses > max_uses:
        return None
    return Overflow(levels[0].level)


def _above(setting: LevelSetting, levels: list[LevelSetting]) -> list[LevelSetting]:
    """The level above the others. One that takes what is evicted gets it from there.

    Unless the one above waits for a page's second use: what is not used again then comes from the
    device.
    """
    if levels and levels[0].min_uses == 0 and (setting.min_uses or 0) <= 1:
        levels = [replace(levels[0], min_uses=None), *levels[1:]]
    return [setting, *levels]


def _remote(options: EngineOptions, secret: bytes, root: PageKey, item_bytes: int) -> Level:
    """The level that needs a package of its own, which most installations go without."""
    try:
        from kvpaging.levels.remote import RemoteLevel
    except ImportError as error:
        raise ConfigError(f"remote_cache: pip install 'kvpaging[remote]' ({error})") from error
    return RemoteLevel(
        options.remote_cache_url or "",
        secret=secret,
        root=root,
        item_bytes=item_bytes,
        compress=options.remote_cache_compress,
        batch_deadline_s=options.remote_cache_deadline_s,
        ttl_s=options.remote_cache_ttl_s,
    )


def _secret(options: EngineOptions) -> bytes:
    """The secret for pages on a remote server. Raises ConfigError."""
    if options.cache_secret_file is None:
        raise ConfigError(
            "the remote cache needs cache_secret, a file of at least 16 random bytes that all "
            "servers which share pages have: head -c 32 /dev/urandom > FILE"
        )
    return read_secret(Path(options.cache_secret_file))


def _code() -> bytes:
    """SHA-256 over the code that computes: kernels, the native library among them, and models.

    A new build may round otherwise: pages that an older one left on a disk are not its pages.
    """
    code = hashlib.sha256(torch.__version__.encode())
    for package in (kernels, execution):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".so"):
                code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return code.digest()


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
