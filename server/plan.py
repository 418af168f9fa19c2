"""`kvpaging plan` and `kvpaging bench`: what their flags mean."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvpaging.base.config import EngineOptions
from kvpaging.base.errors import ConfigError
from kvpaging.base.kv_spec import DTYPE_BYTES, QUANTISED_BYTES, KVSpec
from kvpaging.cache.eviction.names import DEFAULT_POLICY, POLICIES
from kvpaging.execution.checkpoint import resolve_checkpoint
from kvpaging.execution.model_config import read_model_config
from kvpaging.replay.full_mode import Limits, StepTimes
from kvpaging.replay.sizing import Expectation, ModelSize, expect, times_of_device
from kvpaging.replay.trace import open_trace
from server.settings import FlagParser, parse_size


def add_bench_flags(parser: FlagParser) -> None:
    """Give the parser bench's flags."""
    parser.add_argument("--model", metavar="DIR", help="default: the demo model")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", metavar="NAME", help="default: the checkpoint's")
    parser.add_argument("--kv-cache-dtype", metavar="NAME", help="default: the model's")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads that compute")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def bench(options: Namespace) -> Iterator[str]:
    """Measure step times on this machine; gives the lines to print. Raises ConfigError."""
    from kvpaging.engine.step_times import measure  # imports torch

    measured = measure(
        EngineOptions(
            model=_model(options.model),
            device=options.device,
            dtype=options.dtype,
            kv_cache_dtype=options.kv_cache_dtype,
            threads=options.threads,
            max_num_batched_tokens=512,
        )
    )
    if options.json:
        yield msgspec.json.encode(measured).decode()
        return
    times = measured.times
    yield f"{measured.model} on {measured.device}, {measured.num_steps} steps:"
    yield f"  any step             {times.fixed_s * 1e3:10.3f} ms"
    yield f"  each new token       {times.per_new_token_s * 1e6:10.2f} us"
    yield f"  each token of context{times.per_context_token_s * 1e6:10.4f} us"
    yield f"  each pair of these    {times.per_pair_s * 1e9:10.3f} ns"
    yield f"  each sequence        {times.per_sequence_s * 1e6:10.2f} us"
    yield f"  median error of the fit {measured.error_ratio:.0%}"


def add_plan_flags(parser: FlagParser) -> None:
    """Give the parser plan's flags."""
    parser.add_argument("--trace", required=True, type=Path, help="requests to expect")
    parser.add_argument("--model", metavar="DIR", help="default: the demo model")
    parser.add_argument("--dtype", metavar="NAME", help="default: the checkpoint's")
    parser.add_argument("--kv-cache-dtype", metavar="NAME", help="default: the model's")
    parser.add_argument("--memory", metavar="SIZE", help="weights and KV pages together")
    parser.add_argument("--kv-cache-memory", metavar="SIZE", help="KV pages alone")
    parser.add_argument(
        "--rate",
        action="append",
        type=float,
        metavar="REQUESTS_PER_S",
        help="may be repeated (default: 1)",
    )
    parser.add_argument("--requests", type=int, metavar="N", help="only the trace's first N")
    parser.add_argument("--steps", type=Path, metavar="FILE", help="of 'kvpaging bench --json'")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of the device's memory")
    parser.add_argument("--tflops", type=float, metavar="TFLOP/S", help="of the device")
    parser.add_argument("--page-size", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--max-num-seqs", type=int, default=256, metavar="N")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--policy", default=DEFAULT_POLICY, metavar="NAME")
    parser.add_argument("--json", action="store_true", help="one JSON object a rate")


def plan(options: Namespace) -> Iterator[str]:
    """Say what to expect; gives the lines to print. Raises ConfigError."""
    _check(options)
    size = _size(options.model, options.dtype, options.kv_cache_dtype)
    kv_bytes = _kv_bytes(options, size)
    times = _times(options, size)
    trace = open_trace(options.trace)
    limits = Limits(options.max_num_seqs, options.max_num_batched_tokens)
    for number, rate in enumerate(options.rate or [1.0]):
        found = expect(
            trace,
            size,
            kv_bytes,
            times,
            requests_per_s=rate,
            page_size=options.page_size,
            limits=limits,
            policy=options.policy,
            num_requests=options.requests,
        )
        if options.json:
            yield json.dumps(found.as_json())
            continue
        if not number:
            yield (
                f"{size.weight_bytes / 1e9:.2f} GB of weights, {kv_bytes / 1e9:.2f} GB for "
                f"{found.num_pages} pages: {found.num_tokens_that_fit} tokens, "
                f"{found.num_requests_that_fit:.1f} requests of the trace's mean length"
            )
            yield (
                f"{'req/s':>7} {'hit ratio':>9} {'ttft p50':>9} {'ttft p99':>9} "
                f"{'tokens/s':>9} {'preempted':>9} {'rejected':>8}"
            )
        yield _row(found)


def _row(found: Expectation) -> str:
    outcome = found.outcome
    p50, p99 = 0.0, 0.0
    if outcome.latencies is not None:
        p50, p99 = outcome.latencies.ttft_p50_s, outcome.latencies.ttft_p99_s
    return (
        f"{found.requests_per_s:7.2f} {outcome.hit_ratio_tokens:9.4f} {p50:8.3f}s {p99:8.3f}s "
        f"{found.output_tokens_per_s:9.1f} {outcome.num_preemptions:9} {outcome.num_rejected:8}"
        + ("  overloaded" if found.is_overloaded else "")
    )


def _check(options: Namespace) -> None:
    if options.policy not in POLICIES:
        raise ConfigError(f"--policy must be {', '.join(POLICIES)}, not {options.policy!r}")
    for name in ("page_size", "max_num_seqs", "max_num_batched_tokens", "requests"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for name, values in (
        ("rate", options.rate or []),
        ("bandwidth", [options.bandwidth]),
        ("tflops", [options.tflops]),
    ):
        for value in values:
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"--{name} must be above 0, not {value}")


def _model(model: str | None) -> str:
    from server.settings import Settings

    return Settings.model_validate({"model": model}).model_or_demo


def _size(model: str | None, dtype: str | None, kv_cache_dtype: str | None) -> ModelSize:
    directory = resolve_checkpoint(_model(model))
    config = read_model_config(directory)
    stored = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    used = dtype or config.dtype
    if used not in DTYPE_BYTES:
        raise ConfigError(f"--dtype must be {', '.join(DTYPE_BYTES)}, not {used!r}")
    kept = kv_cache_dtype or used
    if kept not in (used, *QUANTISED_BYTES):
        names = ", ".join((used, *QUANTISED_BYTES))
        raise ConfigError(f"--kv-cache-dtype must be {names}, not {kept!r}")
    num_parameters = stored // DTYPE_BYTES[config.dtype]
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, 1, kept)
    return ModelSize(
        weight_bytes=num_parameters * DTYPE_BYTES[used],
        num_parameters=num_parameters,
        kv_bytes_per_token=spec.page_bytes,
        # A product with the key and one with the value, each a multiplication and an addition.
        attention_flops_per_pair=4 * config.num_layers * config.num_heads * config.head_dim,
        max_model_len=config.max_model_len,
    )


def _kv_bytes(options: Namespace, size: ModelSize) -> int:
    if (options.memory is None) == (options.kv_cache_memory is None):
        raise ConfigError("give --memory or --kv-cache-memory, such as 8GiB")
    try:
        given = parse_size(options.memory or options.kv_cache_memory)
    except ValueError as error:
        raise ConfigError(f"the memory must be {error}") from None
    assert isinstance(given, int)  # noqa: S101 - parse_size of text
    return given if options.memory is None else given - size.weight_bytes


def _times(options: Namespace, size: ModelSize) -> StepTimes:
    if options.steps is not None:
        try:
            raw = msgspec.json.decode(options.steps.read_bytes())
            return msgspec.convert(raw["times"], StepTimes)
        except (OSError, KeyError, TypeError, msgspec.DecodeError) as error:
            raise ConfigError(f"{options.steps} is not of 'kvpaging bench': {error}") from None
    if options.bandwidth is None or options.tflops is None:
        raise ConfigError("give --steps FILE (of 'kvpaging bench'), or --bandwidth and --tflops")
    return times_of_device(size, options.bandwidth * 1e9, options.tflops * 1e12)
