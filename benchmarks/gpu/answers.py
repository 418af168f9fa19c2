"""What a run of `run.py` says about each question that only a card can answer.

Reads rows, measures nothing. A question whose part did not run is answered so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from report import FAILED, Row

Results = dict[str, list[Row]]

DECODE_TARGET = 85
"""% of the copy bandwidth, where a call reads half a gigabyte or more."""
PREFILL_TARGET = 350
"""TFLOP/s at 8,192 tokens and head size 128."""
PRICE_TARGET = 1.10
"""What exact linears may cost, and stay the default."""


def answers(results: Results) -> Iterator[Row]:
    """A row for each question, in the order in which they decide something."""
    for question, (part, answer) in QUESTIONS.items():
        rows = [row for row in results.get(part, []) if FAILED not in row]
        try:
            said = answer(rows) if rows else "not measured"
        except (KeyError, ValueError):  # a part that was cut short
            said = "not measured"
        yield {"question": question, "answer": said}


def limits(rows: list[Row]) -> str:
    """The two denominators."""
    return (
        f"{rows[0]['copy GB/s']:.0f} GB/s copied, "
        f"{rows[0]['bf16 matrix TFLOP/s']:.0f} TFLOP/s in bfloat16"
    )


def same_bits(rows: list[Row]) -> str:
    """Of linears in tiles on both sides of the line between the instructions, and of attention."""
    unequal = [row for row in rows if row["unequal %"] > 0]
    if not unequal:
        return f"yes, in all {len(rows)} comparisons"
    worst = max(unequal, key=lambda row: float(row["unequal %"]))
    return (
        f"no: {worst['bits']}, {worst['of']} against {worst['and']}: {worst['unequal %']:.2g} % "
        f"of the entries differ"
    )


def decode_share(rows: list[Row]) -> str:
    """The lowest share of ours in large calls."""
    large = [row for row in rows if row["decode"] == "exact" and row.get("KV GB", 0) >= 0.5]
    worst = min(large, key=lambda row: float(row["of copy %"]))
    share = float(worst["of copy %"])
    verdict = "reached" if share >= DECODE_TARGET else "missed"
    return (
        f"{share:.0f} % at worst ({worst['sequences']} x {worst['keys']} keys, pages of "
        f"{worst['page']}): {DECODE_TARGET} % {verdict}"
    )


def best_decode(rows: list[Row]) -> str:
    """The fastest choice of the sweep."""
    best = max((row for row in rows if "of copy %" in row), key=lambda row: float(row["of copy %"]))
    return f"{best['decode']}: {best['of copy %']:.0f} % of the copy bandwidth"


def prefill_rate(rows: list[Row]) -> str:
    """One whole prompt of 8,192 tokens."""
    whole = {
        str(row["prefill"]): float(row["TFLOP/s"])
        for row in rows
        if row["keys"] == row["queries"] == 8192
    }
    verdict = "reached" if whole["exact"] >= PREFILL_TARGET else "missed"
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in whole.items())
    return f"{rates} TFLOP/s: {PREFILL_TARGET} {verdict}"


def best_prefill(rows: list[Row]) -> str:
    """The fastest choices of the sweep, with and without exact sums."""
    timed = [row for row in rows if "TFLOP/s" in row]
    exact = [row for row in timed if str(row["prefill"]).endswith(" exact")]
    loose = [row for row in timed if row not in exact]
    best = [max(some, key=lambda row: float(row["TFLOP/s"])) for some in (exact, loose)]
    return "; ".join(f"{row['prefill']}: {row['TFLOP/s']:.0f} TFLOP/s" for row in best)


def linear_price(rows: list[Row]) -> str:
    """All of a layer's products and the head's, by the number of rows."""
    ours: dict[int, float] = {}
    vendor: dict[int, float] = {}
    for row in rows:
        ours[row["rows"]] = ours.get(row["rows"], 0.0) + row["exact us"]
        vendor[row["rows"]] = vendor.get(row["rows"], 0.0) + row["cuBLAS us"]
    prices = {count: ours[count] / vendor[count] for count in ours}
    verdict = "stays" if max(prices.values()) <= PRICE_TARGET else "does not stay"
    listed = ", ".join(f"{price:.2f} at {count}" for count, price in prices.items())
    return f"{listed} rows, of cuBLAS's time: exact {verdict} the default by 10 %"


def swap_way(rows: list[Row]) -> str:
    """The fastest way."""
    rates = {str(row["swap out"]): float(row["GB/s"]) for row in rows}
    best = max(rates, key=lambda name: rates[name])
    return ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()) + f": {best}"


def layout_price(rows: list[Row]) -> str:
    """The most layers in a page against one."""
    first, last = rows[0], rows[-1]
    return f"{last['us'] / first['us']:.2f} of the time with {last['decode']}"


QUESTIONS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "1. What do a copy and a product reach?": ("limits", limits),
    "2. Do small and large matrix instructions give the same bits?": ("bits", same_bits),
    "3. What share of the copy bandwidth has decode?": ("decode", decode_share),
    "3. Which decode tiles and split are best?": ("sweep-decode", best_decode),
    "4. What rate has prefill at 8k tokens?": ("prefill", prefill_rate),
    "4. Which extend tiles are best?": ("sweep-prefill", best_prefill),
    "5. What do exact linears cost against cuBLAS?": ("linear", linear_price),
    "6. Which way do pages move to the host best?": ("swap", swap_way),
    "7. What does page-major cost against layer-major?": ("layout", layout_price),
}
"""Numbered as in docs/kernels-gpu.md; the part of the run that answers each."""
