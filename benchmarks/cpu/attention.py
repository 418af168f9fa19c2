"""Paged attention on the CPU beside what this machine can do, in one run.

    python benchmarks/cpu/attention.py [--threads N] [--layers L] [--seconds S] [--dtype D] [--json]

`limit` is the least time's share of the median: keys and values over the bandwidth at which all
threads read 1 GiB, or products over the rate of matrix products (the better of torch's linear and
ours), whichever takes longer. Both are measured here, in the same minute. What sequences share is
to be read once. Sequences lie in one page-major pool, pages
shuffled; calls take one layer after the other, so that keys and values come from memory.
Figures are medians (and the best) of interleaved repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from limits import read_bandwidth, timed

from kernels import Ops, registry
from kernels.ops import KVPages
from kvpaging.base.kv_spec import KVSpec
from kvpaging.execution.kv_pool import KVPool

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 16, 8, 128, 16


@dataclass(frozen=True)
class Case:
    """Sequences of one length with so many new queries each, and so many tokens in common."""

    name: str
    num_seqs: int
    length: int
    queries: int
    common: int = 0

    @property
    def products(self) -> int:
        """Floating point operations of the visible scores and of the weighted values."""
        seen = sum(range(self.length - self.queries + 1, self.length + 1))
        return 4 * self.num_seqs * seen * HEADS * HEAD_DIM

    def bytes_read(self, itemsize: int) -> int:
        """Keys and values of all sequences, once."""
        tokens = self.common + self.num_seqs * (self.length - self.common)
        return 2 * tokens * KV_HEADS * HEAD_DIM * itemsize


CASES = (
    Case("decode 32 x 1024", 32, 1024, 1),
    Case("decode 8 x 1024", 8, 1024, 1),
    Case("decode 32 x 1088, 1024 common", 32, 1088, 1, 1024),
    Case("decode 8 x 1088, 1024 common", 8, 1088, 1, 1024),
    Case("decode 2 x 1088, 1024 common", 2, 1088, 1, 1024),
    Case("decode 1 x 192", 1, 192, 1),
    Case("decode 1 x 4096", 1, 4096, 1),
    Case("prefill 1024", 1, 1024, 1024),
    Case("extend 512 at 3584", 1, 4096, 512),
    Case("extend 64 at 1024", 1, 1088, 64),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    median_us: float
    best_us: float
    rate: float
    """GB/s of a decode, GFLOP/s of a prefill, by the median."""
    limit: float
    """The least time's share of the median."""


def product_rate(ops: Ops, dtype: torch.dtype, seconds: float) -> float:
    """Operations a second of a layer's linears over 1,024 rows, the better of torch and ours."""
    rates = []
    for n, k in ((4096, 1024), (6144, 1024)):
        x, weight = torch.randn(1024, k).to(dtype), torch.randn(n, k).to(dtype)
        ours = ops.prepare_linear(weight.clone())
        ways = (partial(F.linear, x, weight), partial(ops.linear, x, ours))
        rates.append(2 * 1024 * n * k / min(min(timed(way, seconds / 4)) for way in ways))
    return max(rates)


class Layers:
    """One case in a pool of several layers; each call attends in the next of them."""

    def __init__(self, ops: Ops, pool: KVPool, case: Case, dtype: torch.dtype) -> None:
        self._ops = ops
        self._pool = pool
        self._next = 0
        pages_each = -(-case.length // PAGE_SIZE)
        pages = 1 + torch.randperm(pool.num_pages)[: case.num_seqs * pages_each]
        tables = pages.to(torch.int32).view(case.num_seqs, pages_each)
        tables[:, : case.common // PAGE_SIZE] = tables[0, : case.common // PAGE_SIZE]
        self._query = torch.randn(case.num_seqs * case.queries, HEADS, HEAD_DIM)
        self._query = self._query.to(dtype)
        self._batch = (
            tables,
            torch.full((case.num_seqs,), case.length, dtype=torch.int32),
            torch.arange(case.num_seqs + 1, dtype=torch.int32) * case.queries,
        )

    def __call__(self) -> torch.Tensor:
        """`[T, HQ, D]` of the next layer."""
        self._next = (self._next + 1) % self._pool.spec.num_layers
        pages = self._pool.layer(self._next)
        return self._ops.paged_attention(self._query, pages, *self._batch, scale=HEAD_DIM**-0.5)


def _fill(pages: KVPages) -> None:
    for entries in (pages.keys, pages.values):
        for page in entries:
            page.normal_()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="a case")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    ops = registry.select("cpu", prefer="native", threads=args.threads)
    dtype = getattr(torch, args.dtype)

    bandwidth = read_bandwidth(args.seconds)
    products = product_rate(ops, dtype, args.seconds)
    cases = [case for case in CASES if args.only in case.name]
    most = max(case.num_seqs * -(-case.length // PAGE_SIZE) for case in cases)
    spec = KVSpec(
        num_layers=args.layers,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=PAGE_SIZE,
        dtype=args.dtype,
    )
    pool = KVPool(spec, most, torch.device("cpu"))
    for layer in range(args.layers):
        _fill(pool.layer(layer))

    rows = []
    for case in cases:
        times = timed(Layers(ops, pool, case, dtype), args.seconds)
        median, best = statistics.median(times), min(times)
        least = max(case.bytes_read(dtype.itemsize) / bandwidth, case.products / products)
        done = case.bytes_read(dtype.itemsize) if case.queries == 1 else case.products
        rows.append(Row(case.name, median * 1e6, best * 1e6, done / median / 1e9, least / median))
    if args.json:
        machine = {"read_gb_s": bandwidth / 1e9, "gflop_s": products / 1e9}
        print(json.dumps({**machine, "rows": [asdict(row) for row in rows]}))
        return
    print(
        f"{ops.name}, {args.dtype}, {args.threads} threads: reads {bandwidth / 1e9:.1f} GB/s,"
        f" products {products / 1e9:.0f} GFLOP/s\n"
    )
    print(f"{'':30}{'median us':>11}{'best us':>11}{'G/s':>8}{'limit':>7}")
    for r in rows:
        print(f"{r.case:30}{r.median_us:11.0f}{r.best_us:11.0f}{r.rate:8.1f}{r.limit:7.0%}")


if __name__ == "__main__":
    main()
