"""Checks and times the Triton kernels on this machine's card; prints tables and writes JSON.

    PYTHONPATH=. python benchmarks/gpu/run.py [--out gpu.json] [--only decode,prefill]

Needs torch, Triton and this checkout, nothing else. Every rate is beside the limit measured in the
same run: copy bandwidth and matrix rate. Ends within eight minutes: what no longer fits is named.
What fails is a row that says so, and the exit status is 1.
`TRITON_INTERPRET=1 ... --tiny` runs every part on a CPU, to find mistakes; its times mean nothing.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

import jit_cases
from answers import answers
from peers import Problem, peers
from report import (
    FAILED,
    TIME_LIMIT_S,
    Machine,
    Row,
    attempt,
    begin,
    finish,
    parser_for,
    print_table,
)

from kernels import splits
from kernels.jit import TritonOps, attention, linear
from kernels.jit.attention import Attention, AttentionTiles, Tiles
from kernels.jit.launch import Schedule, current_target, runner_for
from kernels.ops import KVPages

# --- checks ---------------------------------------------------------------------------------------


def run_checks(machine: Machine) -> Iterator[Row]:
    """Each kernel against float64 or plain torch, then bits."""
    ops, device = jit_cases.make_ops(machine.device), machine.device
    case, bf16 = jit_cases.AttentionCase, torch.bfloat16
    lengths = machine.pick((1, 15, 16, 17, 255, 256, 257, 513), (1, 17))
    ones = (1,) * len(lengths)
    bit_rows = machine.pick((1, 16, 64, 65, 257, 600), (1, 20))
    checks: dict[str, Callable[[], None]] = {
        "rows": partial(jit_cases.check_rows, ops, 9, 1000, bf16, device),
        "rope_store": partial(jit_cases.check_rope_store, ops, 20, bf16, device),
        "copy_pages": partial(jit_cases.check_copy_pages, ops, bf16, device),
        "sample": partial(jit_cases.check_sample, ops, 8, 1000, device),
        "grouped_linear": partial(jit_cases.check_grouped_linear, ops, 20, 4, device),
        "linear": partial(jit_cases.check_linear, ops, 5, 136, 40, bf16, device),
        "linear bits": partial(jit_cases.check_linear_bits, ops, bit_rows, 136, 40, device),
    }
    for dim in machine.pick((64, 128, 256), (64,)):
        for name, features in (("", {}), (" window cap sinks", FEATURES)):
            decode = case(lengths, ones, head_dim=dim, **features)
            extend = case(lengths, lengths, head_dim=dim, **features)
            both = machine.pick((400, 30, 300), (20, 5))
            bits = case(both, (0,) * len(both), head_dim=dim, **features)
            for label, one in (("decode", decode), ("extend", extend)):
                checks[f"{label} {dim}{name}"] = partial(
                    jit_cases.check_attention, ops, one, device
                )
            checks[f"attention bits {dim}{name}"] = partial(
                jit_cases.check_bits, ops, bits, machine.pick((37, 200), (20,)), device
            )
    for name, check in checks.items():

        def checked(check: Callable[[], None] = check) -> Row:
            check()
            return {"outcome": "ok"}

        yield attempt({"check": name}, checked)


FEATURES: dict[str, Any] = {"window": 100, "soft_cap": 20.0, "has_sinks": True}


# --- attention ------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """The tensors of a call, as `kernels.ops.Ops.paged_attention` takes them."""

    query: torch.Tensor
    pages: KVPages
    page_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_starts: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """Equal sequences in a pool of one layer's pages, shuffled."""

    num_seqs: int
    seq_len: int
    num_queries: int = 1
    page_size: int = 16
    num_layers: int = 1
    """Of the page-major pool whose first layer is read: how far apart pages lie."""
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def kv_bytes(self) -> int:
        """Keys and values that a call must read."""
        return 4 * self.num_seqs * self.seq_len * self.kv_heads * self.head_dim

    @property
    def flop(self) -> float:
        """Of the visible keys only."""
        seen = self.num_queries * (self.seq_len - (self.num_queries - 1) / 2)
        return 4.0 * self.num_seqs * self.heads * self.head_dim * seen

    def inputs(self, machine: Machine) -> Inputs:
        """Of one call."""
        pages_each = -(-self.seq_len // self.page_size)
        count = self.num_seqs * pages_each
        shape = (count, self.num_layers, 2, self.kv_heads, self.page_size, self.head_dim)
        pool = torch.empty(shape, dtype=torch.bfloat16, device=machine.device)
        pool[:, 0].normal_()
        tables = torch.randperm(count, device=machine.device).view(self.num_seqs, pages_each)
        starts = torch.arange(self.num_seqs + 1, device=machine.device) * self.num_queries
        return Inputs(
            machine.random(self.num_seqs * self.num_queries, self.heads, self.head_dim),
            KVPages(pool[:, 0, 0], pool[:, 0, 1]),
            tables.to(torch.int32),
            torch.full((self.num_seqs,), self.seq_len, device=machine.device, dtype=torch.int32),
            starts.to(torch.int32),
        )


def attend_with(
    machine: Machine, inputs: Inputs, tiles: AttentionTiles, *, exact: bool
) -> tuple[Callable[[], object], torch.Tensor]:
    """A call with given tiles, its memory taken before; and what it fills."""
    query = inputs.query
    call = Attention(*inputs, query.shape[2] ** -0.5, None, None, None, tiles, exact)
    parts = (call.part_rows, query.shape[1], call.max_splits)
    out = torch.full_like(query, torch.nan)
    launches = call.launches(
        out,
        None,
        torch.empty(*parts, query.shape[2], dtype=torch.float32, device=machine.device),
        torch.empty(*parts, 2, dtype=torch.float32, device=machine.device),
    )
    run = runner_for(current_target(), query.device)
    return lambda: [run(launch) for launch in launches], out


def default_tiles(batch: Batch, *, exact: bool) -> AttentionTiles:
    """What `TritonOps` would take."""
    group = batch.heads // batch.kv_heads
    return attention.choose_tiles(
        current_target(), batch.head_dim, group, torch.bfloat16, exact=exact
    )


def timed_peers(
    machine: Machine,
    batch: Batch,
    inputs: Inputs,
    kind: str,
    row: Callable[[Machine, Batch, str, Callable[[], object]], Row],
) -> Iterator[Row]:
    """A `row` of each other package's attention on the same problem."""

    def prepared_row(name: str, prepare: Callable[[], Callable[[], object]]) -> Row:
        return row(machine, batch, name, prepare())

    problem = Problem(inputs.query, inputs.pages, inputs.page_tables, batch.seq_len)
    for name, prepare in peers(problem):
        yield attempt({kind: name}, partial(prepared_row, name, prepare))


def decode_row(machine: Machine, batch: Batch, name: str, run: Callable[[], object]) -> Row:
    """Time and rate of one decode call."""
    took_ms = machine.graph_ms(run) if batch.kv_bytes < 1 << 26 else machine.time_ms(run)
    rate = batch.kv_bytes / took_ms / 1e6
    return {
        "decode": name,
        "sequences": batch.num_seqs,
        "keys": batch.seq_len,
        "page": batch.page_size,
        "KV GB": batch.kv_bytes / 1e9,
        "us": took_ms * 1e3,
        "KV GB/s": rate,
        "of copy %": 100 * rate / machine.copy_gb_s,
    }


def bench_decode(machine: Machine) -> Iterator[Row]:
    """Our two settings against what other packages are installed, and torch's on dense keys."""
    shapes = [(1, 2048), (1, 32768), (8, 4096), (64, 512), (64, 4096), (256, 2048)]
    for num_seqs, seq_len in machine.pick(shapes, [(2, 300)]):
        for page_size in machine.pick((16, 64), (16,)):
            batch = Batch(num_seqs, seq_len, page_size=page_size, **machine.pick({}, TINY_HEADS))
            inputs = batch.inputs(machine)
            for exact in (True, False):
                tiles = default_tiles(batch, exact=exact)
                run, _ = attend_with(machine, inputs, tiles, exact=exact)
                yield decode_row(machine, batch, "exact" if exact else "not exact", run)
        yield from timed_peers(machine, batch, inputs, "decode", decode_row)


TINY_HEADS = {"heads": 2, "kv_heads": 1, "head_dim": 16}


def bench_layout(machine: Machine) -> Iterator[Row]:
    """Does page-major (a page's layers together) cost anything against layer-major?"""
    for layers in machine.pick((1, 8, 32), (1, 2)):
        num_seqs, seq_len = machine.pick((32, 4096), (2, 300))
        heads = machine.pick({}, TINY_HEADS)
        batch = Batch(num_seqs, seq_len, num_layers=layers, **heads)
        pool_bytes = batch.kv_bytes * layers
        if machine.device == "cuda" and pool_bytes > 0.6 * torch.cuda.mem_get_info()[0]:
            continue
        run, _ = attend_with(
            machine, batch.inputs(machine), default_tiles(batch, exact=True), exact=True
        )
        yield decode_row(machine, batch, f"{layers} layers a page", run)


def sweep_decode(machine: Machine) -> Iterator[Row]:
    """Tile, warps, stages and split of the decode kernel at one large batch."""
    batch = Batch(*machine.pick((64, 4096), (2, 300)), **machine.pick({}, TINY_HEADS))
    inputs = batch.inputs(machine)
    choices = [
        (rows, tile, warps, stages)
        for rows in (16, 64)
        for tile in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3, 5)
    ]
    for rows, tile, warps, stages in machine.pick(choices, choices[:2]):
        tiles = Tiles(rows, tile, Schedule(warps, stages))
        name = f"rows {rows} tile {tile} warps {warps} stages {stages}"
        yield try_decode(machine, batch, inputs, name, tiles)
    shipped = splits.SPLIT
    try:
        for split in (256, 512, 1024, 2048):
            vars(attention)["SPLIT"] = split  # what its launches are made of
            tiles = default_tiles(batch, exact=False).decode
            yield try_decode(machine, batch, inputs, f"split {split}", tiles)
    finally:
        vars(attention)["SPLIT"] = shipped


def try_decode(machine: Machine, batch: Batch, inputs: Inputs, name: str, tiles: Tiles) -> Row:
    """The row of one choice of tiles, or why there is none."""

    def measure() -> Row:
        run, _ = attend_with(machine, inputs, AttentionTiles(tiles, tiles), exact=False)
        return decode_row(machine, batch, name, run)

    return attempt({"decode": name}, measure)


def prefill_row(machine: Machine, batch: Batch, name: str, run: Callable[[], object]) -> Row:
    """Time and rate of one prefill call."""
    took_ms = machine.time_ms(run)
    rate = batch.flop / took_ms / 1e9
    return {
        "prefill": name,
        "sequences": batch.num_seqs,
        "keys": batch.seq_len,
        "queries": batch.num_queries,
        "ms": took_ms,
        "TFLOP/s": rate,
        "of matrix %": 100 * rate / machine.matrix_tflop_s,
    }


def bench_prefill(machine: Machine) -> Iterator[Row]:
    """Whole prompts, then chunks at the end of a long one, against the same."""
    shapes = [(8, 1024, 1024), (1, 8192, 8192), (1, 32768, 32768), (1, 32768, 2048), (1, 8192, 512)]
    for num_seqs, seq_len, num_queries in machine.pick(shapes, [(1, 40, 40)]):
        batch = Batch(num_seqs, seq_len, num_queries, **machine.pick({}, TINY_HEADS))
        inputs = batch.inputs(machine)
        for exact in (True, False):
            run, _ = attend_with(machine, inputs, default_tiles(batch, exact=exact), exact=exact)
            yield prefill_row(machine, batch, "exact" if exact else "not exact", run)
        yield from timed_peers(machine, batch, inputs, "prefill", prefill_row)


def sweep_prefill(machine: Machine) -> Iterator[Row]:
    """Tiles of the extend kernel at one long prompt, with and without split sums."""
    length = machine.pick(8192, 40)
    for page_size in machine.pick((16, 64), (16,)):
        batch = Batch(1, length, length, page_size, **machine.pick({}, TINY_HEADS))
        inputs = batch.inputs(machine)
        choices = [
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 3), (128, 128, 8, 2),
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 64, 8, 2), (256, 64, 8, 2),
        ]  # fmt: skip
        for rows, tile, warps, stages in machine.pick(choices, choices[:1]):
            for exact in (True, False):
                tiles = Tiles(rows, tile, Schedule(warps, stages))
                name = f"{rows}x{tile} warps {warps} stages {stages} page {page_size}"
                name += " exact" if exact else ""
                yield try_prefill(machine, batch, inputs, name, tiles, exact=exact)


def try_prefill(
    machine: Machine, batch: Batch, inputs: Inputs, name: str, tiles: Tiles, *, exact: bool
) -> Row:
    """The row of one choice of tiles, or why there is none."""

    def measure() -> Row:
        run, _ = attend_with(machine, inputs, AttentionTiles(tiles, tiles), exact=exact)
        return prefill_row(machine, batch, name, run)

    return attempt({"prefill": name}, measure)


# --- linears --------------------------------------------------------------------------------------


def bench_linear(machine: Machine) -> Iterator[Row]:
    """The weights of Llama 3 8B: what exact linears cost against cuBLAS."""
    shapes = {
        "qkv": (6144, 4096),
        "output": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    }
    ops = TritonOps(machine.device)
    for name, (n, k) in machine.pick(shapes, {"qkv": (96, 64)}).items():
        weight = machine.random(n, k)
        prepared = ops.prepare_linear(weight)
        for rows in machine.pick((1, 8, 32, 64, 128, 256, 512, 4096), (1, 3)):
            x = machine.random(rows, k)
            ours_ms = machine.time_ms(partial(ops.linear, x, prepared))
            vendor_ms = machine.time_ms(partial(F.linear, x, weight))
            least_bytes = 2 * (n * k + rows * (n + k))
            least_ms = max(
                least_bytes / machine.copy_gb_s / 1e6,
                2 * rows * n * k / machine.matrix_tflop_s / 1e9,
            )
            yield {
                "linear": name,
                "rows": rows,
                "exact us": ours_ms * 1e3,
                "cuBLAS us": vendor_ms * 1e3,
                "exact / cuBLAS": ours_ms / vendor_ms,
                "of least %": 100 * least_ms / ours_ms,
            }


def sweep_linear(machine: Machine) -> Iterator[Row]:
    """Tiles of the product, for few rows and for many."""
    n, k = machine.pick((4096, 4096), (96, 64))
    weight = machine.random(n, k)
    narrow = [(64, bn, w, s) for bn in (16, 32, 64) for w in (4,) for s in (3, 6, 8)]
    wide = [(128, 128, 4, 4), (128, 128, 8, 3), (128, 256, 8, 3), (128, 256, 8, 4), (64, 256, 4, 4)]
    run = runner_for(current_target(), weight.device)
    for rows, choices in machine.pick(((1, narrow), (64, narrow), (4096, wide)), ((2, wide[:1]),)):
        x = machine.random(rows, k)
        out = torch.empty(rows, n, dtype=x.dtype, device=machine.device)
        for block_m, block_n, warps, stages in choices:
            tiles = linear.Tiles(block_m, block_n, linear.BLOCK_K, Schedule(warps, stages))
            launch = linear.linear_launch(out, x, weight, None, None, tiles)
            name = f"{block_m}x{block_n} warps {warps} stages {stages}"
            timed = partial(machine.time_ms, partial(run, launch))

            def measure(timed: Callable[[], float] = timed) -> Row:
                return {"us": timed() * 1e3}

            yield attempt({"linear tile": name, "rows": rows}, measure)


# --- bits -----------------------------------------------------------------------------------------


def compare_bits(machine: Machine) -> Iterator[Row]:
    """Do small and large matrix instructions give the same bits? Decides the exact tiles."""
    k = machine.pick(4096, 64)
    x, weight = machine.random(128, k), machine.random(256, k)
    run = runner_for(current_target(), x.device)
    results = {}
    for block_m, block_n, warps in machine.pick(
        ((16, 32, 4), (32, 32, 4), (64, 32, 4), (64, 128, 4), (128, 256, 8)),
        ((16, 32, 4), (64, 32, 4)),
    ):
        out = torch.full((128, 256), torch.nan, device=machine.device)
        tiles = linear.Tiles(block_m, block_n, linear.BLOCK_K, Schedule(warps, 3))
        run(linear.linear_launch(out, x, weight, None, None, tiles))
        results[f"{block_m}x{block_n}"] = out
    yield from differences("linear", results)
    for head_dim in machine.pick((64, 128, 256), (16,)):
        yield from attention_bits(machine, head_dim)


def attention_bits(machine: Machine, head_dim: int) -> Iterator[Row]:
    """Decode against extend, in exact tiles and with 16 rows for decode."""
    length = machine.pick(1000, 20)
    heads = {**machine.pick({}, TINY_HEADS), "head_dim": head_dim}
    prompt, query = Batch(1, length, length, **heads), Batch(1, length, 1, **heads)
    shared = prompt.inputs(machine)
    last = query.inputs(machine)._replace(
        query=shared.query[-1:].contiguous(), pages=shared.pages, page_tables=shared.page_tables
    )
    exact, loose = default_tiles(query, exact=True), default_tiles(query, exact=False)
    small = dataclasses.replace(loose.decode, tile=exact.decode.tile)
    results = {}
    for name, inputs, tiles in (
        ("extend", shared, exact),
        ("decode, exact tiles", last, exact),
        ("decode, 16 rows", last, AttentionTiles(small, small)),
    ):
        run, out = attend_with(machine, inputs, tiles, exact=True)
        run()
        results[name] = out[-1]
    yield from differences(f"attention {head_dim}", results)


def differences(what: str, results: dict[str, torch.Tensor]) -> Iterator[Row]:
    """How many entries of the others differ in any bit from the first."""
    first, *others = results
    for other in others:
        unequal = (results[first] != results[other]).float().mean().item()
        yield {"bits": what, "of": first, "and": other, "unequal %": 100 * unequal}


# --- moving pages ---------------------------------------------------------------------------------


def bench_swap(machine: Machine) -> Iterator[Row]:
    """Device pages to pinned host memory: copy_ page by page, in one run, and by `swap_out`."""
    # Pages of 16 tokens of Llama 3 8B.
    page_bytes, count = machine.pick((2 << 20, 256), (1 << 10, 3))
    shape = (page_bytes // 8,)
    pool = torch.zeros(2 * count, *shape, dtype=torch.int64, device=machine.device)
    pinned = machine.device == "cuda"
    host = torch.zeros(count, *shape, dtype=torch.int64, pin_memory=pinned)
    pages = torch.randperm(2 * count)[:count]
    on_device = pages.to(machine.device)
    places = torch.arange(count, device=machine.device)
    ops = TritonOps(machine.device)

    def page_by_page() -> None:
        for index, page in enumerate(pages.tolist()):
            host[index].copy_(pool[page], non_blocking=True)

    ways: dict[str, Callable[[], object]] = {
        "copy_ page by page": page_by_page,
        "copy_ in one run": lambda: host.copy_(pool[:count], non_blocking=True),
        "kernel over mapped memory": lambda: ops.swap_out(pool, host, on_device, places),
    }
    for name, run in ways.items():
        times = []
        for _ in range(5):
            machine.synchronize()
            begin = time.perf_counter()
            run()
            machine.synchronize()
            times.append(time.perf_counter() - begin)
        yield {"swap out": name, "GB/s": count * page_bytes / statistics.median(times) / 1e9}


# --- the run --------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Machine], Iterator[Row]]] = {
    "checks": run_checks,
    "bits": compare_bits,
    "decode": bench_decode,
    "prefill": bench_prefill,
    "linear": bench_linear,
    "layout": bench_layout,
    "swap": bench_swap,
    "sweep-decode": sweep_decode,
    "sweep-prefill": sweep_prefill,
    "sweep-linear": sweep_linear,
}
"""In the order of worth: when time runs out, the last ones are missing."""


def collect(
    part: Callable[[Machine], Iterator[Row]], machine: Machine, ends_at: float
) -> list[Row]:
    """The part's rows, as far as time allows; a failure ends the part and is its last row."""
    rows: list[Row] = []
    try:
        for row in part(machine):
            rows.append(row)
            if time.monotonic() > ends_at:
                rows.append({next(iter(row)): "cut short: out of time"})
                break
    except Exception as error:  # noqa: BLE001  (the other parts still count)
        rows.append({FAILED: f"{type(error).__name__}: {str(error)[:300]}"})
    return rows


def main() -> int:
    """Run the parts in order; the JSON is complete after each. 1 where anything failed."""
    parser = parser_for(__doc__, "gpu.json")
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(names) - PARTS.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    ends_at = time.monotonic() + TIME_LIMIT_S

    machine, results = begin(is_tiny=options.tiny)
    for title, rows in results.items():
        print_table(title, rows)
    for name in names:
        if time.monotonic() > ends_at:
            results[name] = [{"skipped": "out of time"}]
        else:
            results[name] = collect(PARTS[name], machine, ends_at)
        print_table(name, results[name])
        options.out.write_text(json.dumps(results, indent=1))
    results["answers"] = list(answers(results))
    print_table("answers", results["answers"])
    return finish(results, options.out)


if __name__ == "__main__":
    sys.exit(main())
