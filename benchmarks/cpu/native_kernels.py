"""Native kernels against plain torch, and both against what this machine can do, in one run.

    python benchmarks/cpu/native_kernels.py [--threads N] [--seconds S]

Prints a table. `limit` is the share of the machine's limit that the native kernel reaches: of the
read bandwidth where an operation reads more than it computes, else of the product rate; both are
measured here, in the same minute. With one thread, times are CPU time of that thread, so that other
work on the machine disturbs little; with more, wall time. Minimum over repeats in turns. Weights
rotate, so that no cache holds them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from kernels import Ops, describe, select
from kernels.ops import KVPages

Call = Callable[[], Any]


@dataclasses.dataclass
class Case:
    """One line of the table."""

    name: str
    native: Call
    torch: Call
    bytes_read: int
    products: int
    other: Call | None = None
    """Another way that torch has; the faster one counts."""


class Clock:
    """Times calls, some of each in turn: torch's threads spin for a while after theirs."""

    def __init__(self, threads: int, seconds: float) -> None:
        self._now = time.thread_time if threads == 1 else time.perf_counter
        self._seconds = seconds

    def best(self, *calls: Call) -> list[float]:
        """Seconds of one call of each, after one warm-up."""
        for call in calls:
            call()
        best = [float("inf")] * len(calls)
        end = time.perf_counter() + self._seconds
        turns = 0
        while time.perf_counter() < end or turns < 3:
            for i, call in enumerate(calls):
                time.sleep(0.01)
                for _ in range(4):
                    start = self._now()
                    call()
                    best[i] = min(best[i], self._now() - start)
            turns += 1
        return best


def copies(bytes_each: int, total: int = 96 << 20) -> int:
    """How many weights of this size overflow the caches."""
    return max(2, min(64, total // bytes_each))


def following(values: list[Any]) -> Callable[[], Any]:
    """One after the other, again and again."""
    endless = itertools.cycle(values)
    return lambda: next(endless)


def linears(native: Ops, dtype: torch.dtype) -> Iterator[Case]:
    """Each linear of Qwen3-0.6B's layers and a head, from one row to a prefill's."""
    for n, k in ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (32000, 1024)):
        size = n * k * dtype.itemsize
        plain = [torch.randn(n, k).to(dtype) for _ in range(copies(size))]
        prepared = following([native.prepare_linear(weight.clone()) for weight in plain])
        natural = following(plain)
        for m in (1, 8, 32, 512):
            x = torch.randn(m, k).to(dtype)
            yield Case(
                f"linear {k}->{n} M={m}",
                lambda x=x, weight=prepared: native.linear(x, weight()),
                lambda x=x, weight=natural: F.linear(x, weight()),
                size,
                m * n * k,
                _packed_by_torch(x, plain),
            )
        int8 = following([native.prepare_int8_linear(weight) for weight in plain])
        for m in (1, 8, 32, 512):
            x = torch.randn(m, k).to(dtype)
            yield Case(
                f"int8 linear {k}->{n} M={m}",
                lambda x=x, weight=int8: native.linear(x, weight()),
                lambda x=x, weight=natural: F.linear(x, weight()),
                n * k,
                m * n * k,
            )


def _packed_by_torch(x: torch.Tensor, plain: list[torch.Tensor]) -> Call | None:
    """The linear of torch over weights in oneDNN's own layout, as compiled models have them."""
    if x.dtype != torch.bfloat16:
        return None
    mkldnn: Any = torch.ops.mkldnn
    weight = following([mkldnn._reorder_linear_weight(w, x.shape[0]) for w in plain])
    return lambda: mkldnn._linear_pointwise(x, weight(), None, "none", [], "")


def attention(native: Ops, plain: Ops, dtype: torch.dtype) -> Iterator[Case]:
    """Decode and prefill of a model with 16 query and 8 KV heads of 128."""
    heads, kv_heads, size, page = 16, 8, 128, 16
    for name, num_seqs, length, queries in (
        ("decode 32 x 1024", 32, 1024, 1),
        ("decode 1 x 4096", 1, 4096, 1),
        ("prefill 1024", 1, 1024, 1024),
        ("extend 128 at 1024", 1, 1024, 128),
    ):
        pages_each = length // page
        pool = torch.randn(num_seqs * pages_each, 2, kv_heads, page, size).to(dtype)
        tables = torch.randperm(pool.shape[0], dtype=torch.int32).view(num_seqs, pages_each)
        query = torch.randn(num_seqs * queries, heads, size).to(dtype)
        arguments = (
            query,
            KVPages(pool[:, 0], pool[:, 1]),
            tables,
            torch.full((num_seqs,), length, dtype=torch.int32),
            torch.arange(num_seqs + 1, dtype=torch.int32) * queries,
        )
        seen = sum(range(length - queries + 1, length + 1))
        dense = _dense(pool[:, 0], tables), _dense(pool[:, 1], tables)
        yield Case(
            name,
            lambda a=arguments: native.paged_attention(*a, scale=size**-0.5),
            (lambda a=arguments: _gather_and_sdpa(*a))
            if queries == 1
            else (lambda q=query, kv=dense: _sdpa_prefill(q, *kv)),
            pool.nbytes,
            2 * num_seqs * seen * heads * size,
        )


def _dense(pages: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    return pages[tables.long()].transpose(1, 2).flatten(2, 3)  # [B, HKV, N, D]


def _gather_and_sdpa(
    query: torch.Tensor, pages: KVPages, tables: torch.Tensor, *_: Any
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        query.unsqueeze(2),
        _dense(pages.keys, tables),
        _dense(pages.values, tables),
        enable_gqa=True,
    )


def _sdpa_prefill(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Without the gather; torch's causal flag fits only when all keys are new."""
    q = query.transpose(0, 1).unsqueeze(0)
    if q.shape[2] == keys.shape[2]:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    past = keys.shape[2] - q.shape[2]
    mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool).tril(past)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)


def rows(native: Ops, plain: Ops, dtype: torch.dtype) -> Iterator[Case]:
    """Norms, activations and what happens to logits."""
    for m in (1, 32, 512):
        x, weight = torch.randn(m, 1024).to(dtype), torch.randn(1024).to(dtype)
        yield Case(
            f"rms_norm {m} x 1024",
            lambda x=x, w=weight: native.rms_norm(x, w, 1e-6),
            lambda x=x, w=weight: F.rms_norm(x, (1024,), w, 1e-6),
            2 * x.nbytes,
            2 * x.numel(),
        )
        gate_up = torch.randn(m, 6144).to(dtype)
        yield Case(
            f"silu_mul {m} x 3072",
            lambda x=gate_up: native.silu_mul(x),
            lambda x=gate_up: F.silu(x[:, :3072]) * x[:, 3072:],
            gate_up.nbytes * 3 // 2,
            gate_up.numel(),
        )
    logits = torch.randn(8, 151936)
    yield Case(
        "log_softmax 8 x 151936",
        lambda: native.log_softmax(logits),
        lambda: logits.log_softmax(-1),
        2 * logits.nbytes,
        logits.numel(),
    )
    choice = (
        torch.full((8,), 0.8),
        torch.full((8,), 50, dtype=torch.int32),
        torch.full((8,), 0.9),
        torch.zeros(8),
        torch.arange(8),
        torch.zeros(8, dtype=torch.int32),
        torch.zeros(8, dtype=torch.int32),
    )
    yield Case(
        "sample 8 x 151936 k=50 p=0.9",
        lambda: native.sample(logits, *choice),
        lambda: plain.sample(logits, *choice),
        logits.nbytes,
        logits.numel(),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.4, help="a case")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    native = select("cpu", prefer="native", threads=options.threads)
    plain = select("cpu", prefer="torch")
    clock = Clock(options.threads, options.seconds)

    large = torch.randn(64 << 20)
    bandwidth = large.nbytes / clock.best(large.sum)[0]
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
    weight = native.prepare_linear(b)
    rates = clock.best(lambda: F.linear(a, b), lambda: native.linear(a, weight))
    rate = 1024 * 1024 * 4096 / min(rates)
    for path in describe():
        print(f"{path.name:8}{path.detail}")
    print(
        f"{options.dtype}, threads {options.threads}: reads {bandwidth / 1e9:.1f} GB/s,"
        f" products {2 * rate / 1e9:.0f} GFLOP/s"
        f" (torch {2 * 1024 * 1024 * 4096 / rates[0] / 1e9:.0f})\n"
    )
    print(f"{'':32}{'native us':>10}{'torch us':>10}{'ratio':>7}{'limit':>7}")
    for cases in (
        linears(native, dtype),
        attention(native, plain, dtype),
        rows(native, plain, dtype),
    ):
        for case in cases:
            others = (case.torch,) if case.other is None else (case.torch, case.other)
            ours, *all_theirs = clock.best(case.native, *others)
            theirs = min(all_theirs)
            least = max(case.bytes_read / bandwidth, case.products / rate)
            print(
                f"{case.name:32}{ours * 1e6:10.0f}{theirs * 1e6:10.0f}{theirs / ours:6.2f}x"
                f"{least / ours:7.0%}"
            )


if __name__ == "__main__":
    main()
