"""Outcomes for people and programs: a table, CSV, a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvpaging.base.errors import ConfigError
from kvpaging.replay.outcome import Outcome

PLOT_SUFFIXES = (".svg", ".png")


def capacity_text(capacity_pages: int | None) -> str:
    """As `--capacity` takes it."""
    return "unlimited" if capacity_pages is None else str(capacity_pages)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines with one outcome each, under a heading."""
    heading = ["policy", "capacity", "page", "mode", "hit pages", "hit tokens", "evicted", "s"]
    in_time = any(outcome.latencies for outcome in outcomes)
    levels = list(dict.fromkeys(name for o in outcomes for name in o.num_level_hit_pages))
    heading += [f"of {name}" for name in levels]
    if in_time:
        heading += ["ttft p50", "ttft p99", "preempted", "rejected", "simulated"]
    rows = [heading]
    for outcome in outcomes:
        row = [
            outcome.policy,
            capacity_text(outcome.capacity_pages),
            str(outcome.page_size),
            outcome.mode,
            f"{outcome.hit_ratio_pages:.4f}",
            f"{outcome.hit_ratio_tokens:.4f}",
            str(outcome.num_evicted_pages),
            f"{outcome.seconds:.2f}",
            *(
                f"{outcome.num_level_hit_pages.get(name, 0) / max(1, outcome.num_pages):.4f}"
                for name in levels
            ),
        ]
        if outcome.latencies is not None:
            row += [
                f"{outcome.latencies.ttft_p50_s:.3f}s",
                f"{outcome.latencies.ttft_p99_s:.3f}s",
                str(outcome.num_preemptions),
                str(outcome.num_rejected),
                f"{outcome.latencies.simulated_s:.0f}s",
            ]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def csv_text(outcomes: Sequence[Outcome]) -> str:
    """One line an outcome, under a heading; empty where an outcome has no such field."""
    rows = [_flat(outcome) for outcome in outcomes]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(outcome: Outcome) -> dict[str, object]:
    """What `as_json` has: each level's hits and each latency a column of its own."""
    row = outcome.as_json()
    del row["latencies"], row["num_level_hit_pages"]
    row |= {f"num_{name}_hit_pages": num for name, num in outcome.num_level_hit_pages.items()}
    if outcome.latencies is not None:
        row |= msgspec.to_builtins(outcome.latencies)
    return row


def check_plot(path: Path) -> None:
    """Raise ConfigError if `plot` could not write this file: before the work, not after."""
    if path.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"--plot must end in .svg or .png, not {path.name!r}")
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib: pip install 'kvpaging[plot]', or use --csv"
        ) from None


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Hit ratio in pages against capacity, a curve a policy, as SVG or PNG. Raises ConfigError."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    curves: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.capacity_pages is None:
            axes.axhline(outcome.hit_ratio_pages, color="0.8", linewidth=1)
        else:
            curves.setdefault((outcome.policy, outcome.mode), []).append(outcome)
    for (policy, mode), points in curves.items():
        points.sort(key=lambda outcome: outcome.capacity_pages or 0)
        axes.plot(
            [outcome.capacity_pages or 0 for outcome in points],
            [outcome.hit_ratio_pages for outcome in points],
            marker="o",
            linestyle="--" if mode == "blocks" else "-",
            label=f"{policy} (blocks)" if mode == "blocks" else policy,
        )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"capacity (pages of {outcomes[0].page_size} tokens)")
    axes.set_ylabel("hit ratio (pages)")
    axes.grid(visible=True, alpha=0.3)
    if curves:
        axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}") from None
