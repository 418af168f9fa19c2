"""`kvpaging replay`: what its flags mean. What replays is `kvpaging.replay`; no torch is loaded."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from kvpaging.base.errors import ConfigError
from kvpaging.cache.eviction.names import DEFAULT_POLICY, POLICIES
from kvpaging.replay.cache_mode import count_pages, replay_blocks, replay_cache
from kvpaging.replay.full_mode import Limits, Simulation, StepTimes
from kvpaging.replay.levels import LevelSize, parse_levels
from kvpaging.replay.outcome import Outcome
from kvpaging.replay.report import check_plot, csv_text, plot, table
from kvpaging.replay.trace import Trace, open_trace
from server.settings import FlagParser, did_you_mean

DEFAULT_SHARES = (0.01, 0.03, 0.1, 0.3)
"""Capacities, as shares of the trace's unique pages, where none are asked for."""


def add_flags(parser: FlagParser) -> None:
    """Give the parser replay's flags."""
    times, limits = StepTimes(), Limits()
    parser.add_argument("trace", metavar="TRACE", type=Path, help="a trace or a recording")
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help=f"{', '.join(POLICIES)} or all; may be repeated (default: {DEFAULT_POLICY})",
    )
    parser.add_argument(
        "--capacity",
        action="append",
        metavar="PAGES",
        help="pages, or unlimited; may be repeated (default: 1, 3, 10 and 30 percent of the "
        "trace's unique pages, and unlimited)",
    )
    parser.add_argument("--page-size", type=int, metavar="TOKENS", help="default: the trace's")
    parser.add_argument(
        "--mode",
        default="cache",
        metavar="MODE",
        help="cache (one request after the other), blocks (the same without leaf order), full "
        "(the scheduler in simulated time) or exact (a recording's own steps, each decision "
        "compared) (default: cache)",
    )
    parser.add_argument(
        "--levels",
        metavar="LEVELS",
        help="cache and full: pages of the levels below, such as host=5000,disk=50000; in full "
        "mode host=5000@6.5e-6 gives the seconds for each loaded token",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a run")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write a CSV file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw an .svg or .png")
    parser.add_argument(
        "--async-scheduling",
        action="store_true",
        help="full: plan the next step before the result of the one before it is known",
    )
    for name, value, what in (
        ("--max-num-seqs", limits.max_num_seqs, "full: sequences that run at once"),
        ("--max-num-batched-tokens", limits.max_num_batched_tokens, "full: tokens a step"),
        ("--step-fixed-s", times.fixed_s, "full: seconds of any step"),
        ("--step-token-s", times.per_new_token_s, "full: seconds for each new token"),
        ("--step-context-s", times.per_context_token_s, "full: seconds for each token read"),
        ("--step-pair-s", times.per_pair_s, "full: seconds for each new token with each it sees"),
        ("--step-sequence-s", times.per_sequence_s, "full: seconds for each sequence"),
    ):
        parser.add_argument(
            name,
            type=type(value),
            default=value,
            metavar="VALUE",
            help=f"{what} (default: {value})",
        )


def replay(options: Namespace) -> Iterator[str]:
    """Run what was asked for; gives the lines to print. Raises ConfigError."""
    if options.mode == "exact":
        yield from _exact(options)
        return
    _check(options)
    trace = open_trace(options.trace)
    outcomes = []
    for policy in _policies(options.policy):
        for capacity in _capacities(options.capacity, trace, options.page_size):
            outcomes.append(_run(options, trace, policy, capacity))
            if options.json:
                yield json.dumps(outcomes[-1].as_json())
    if not options.json:
        yield from table(outcomes)
    if options.csv is not None:
        try:
            options.csv.write_text(csv_text(outcomes))
        except OSError as error:
            raise ConfigError(f"{options.csv} can't be written: {error.strerror}") from None
    if options.plot is not None:
        plot(outcomes, options.plot)


def _check(options: Namespace) -> None:
    modes = ("cache", "blocks", "full", "exact")
    if options.mode not in modes:
        hint = did_you_mean(options.mode, modes)
        raise ConfigError(f"--mode must be {', '.join(modes)}, not {options.mode!r}{hint}")
    for name in ("page_size", "max_num_seqs", "max_num_batched_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if options.plot is not None:
        check_plot(options.plot)
    if options.async_scheduling and options.mode != "full":
        raise ConfigError("--async-scheduling goes with --mode full: the others make no plans")
    if _levels(options) and options.mode == "blocks":
        raise ConfigError("--levels goes with --mode cache or full: blocks have no levels")


def _policies(names: list[str] | None) -> list[str]:
    chosen: list[str] = []
    for name in names or [DEFAULT_POLICY]:
        if name != "all" and name not in POLICIES:
            hint = did_you_mean(name, POLICIES)
            raise ConfigError(f"--policy must be {', '.join(POLICIES)} or all, not {name!r}{hint}")
        chosen += POLICIES if name == "all" else [name]
    return chosen


def _capacities(texts: list[str] | None, trace: Trace, page_size: int | None) -> list[int | None]:
    if texts is None:
        num_unique, _ = count_pages(trace, page_size or trace.block_size)
        return [*(max(1, int(share * num_unique)) for share in DEFAULT_SHARES), None]
    return [_capacity(text) for text in texts]


def _capacity(text: str) -> int | None:
    if text == "unlimited":
        return None
    try:
        capacity = int(text.replace(",", "").replace("_", ""))
    except ValueError:
        capacity = 0
    if capacity < 1:
        raise ConfigError(f"--capacity must be at least 1 page, or unlimited, not {text!r}")
    return capacity


def _run(options: Namespace, trace: Trace, policy: str, capacity: int | None) -> Outcome:
    if options.mode == "cache":
        return replay_cache(trace, policy, capacity, options.page_size, sizes=_levels(options))
    if options.mode == "blocks":
        return replay_blocks(trace, policy, capacity, options.page_size)
    return Simulation(
        trace,
        policy,
        capacity,
        options.page_size,
        limits=Limits(
            options.max_num_seqs,
            options.max_num_batched_tokens,
            async_scheduling=options.async_scheduling,
        ),
        times=StepTimes(
            options.step_fixed_s,
            options.step_token_s,
            options.step_context_s,
            options.step_pair_s,
            options.step_sequence_s,
        ),
        sizes=_levels(options),
    ).run()


def _levels(options: Namespace) -> tuple[LevelSize, ...]:
    return () if options.levels is None else parse_levels(options.levels)


def _exact(options: Namespace) -> Iterator[str]:
    from kvpaging.replay.rerun import rerun

    outcome = rerun(options.trace)
    if options.json:
        yield json.dumps(outcome.as_json())
    else:
        yield outcome.in_words()
