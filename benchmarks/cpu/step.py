"""Whole steps of a model on the CPU, beside the least that this machine could need for them.

    python benchmarks/make_checkpoint.py CHECKPOINT
    python benchmarks/cpu/step.py CHECKPOINT [--threads 2] [--context 192] [--seconds 6] [--json]

A decode step must read all weights and every sequence's keys and values: `least` is those bytes
over the read bandwidth, which is measured before and after each step, since it changes from second
to second on a shared machine. A prefill must multiply: `least` is its products over the rate of
matrix products at the model's own shapes, the better of torch's linear and ours, measured once in
the run. All with the same threads. Steps go through the executor as the engine's do, sampling
included.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from limits import timed, timed_beside_reading

from kernels import registry
from kvpaging.base.config import EngineConfig, EngineOptions
from kvpaging.base.ids import PageId, SeqId, StepId
from kvpaging.base.kv_spec import KVSpec
from kvpaging.execution.loading import load_executor
from kvpaging.execution.local_executor import LocalExecutor
from kvpaging.execution.model_config import ModelConfig, read_model_config
from kvpaging.scheduling.plan import AddedSequence, ScheduledSequence, StepPlan
from kvpaging.scheduling.request import SamplingParams

GREEDY = SamplingParams(max_new_tokens=1, seed=0, temperature=0.0)
PREFILL = 1024


@dataclass(frozen=True)
class Row:
    """One kind of step, in milliseconds."""

    step: str
    best_ms: float
    median_ms: float
    least_ms: float
    gb_per_s: float | None
    """Read beside the steps, the median."""
    ratio: float
    """The median over the steps of each one's time and the least that it could need just then."""


@dataclass(frozen=True)
class Shape:
    """What the model multiplies by: (out, in) of each linear of a layer, and the head's."""

    layers: int
    linears: tuple[tuple[int, int], ...]
    head: tuple[int, int]
    is_head_tied: bool
    """To the embedding, which is never quantized."""

    @staticmethod
    def of(config: ModelConfig) -> Shape:
        """Dense models: queries, keys and values at once, gate and up at once."""
        heads = config.num_heads + 2 * config.num_kv_heads
        return Shape(
            config.num_layers,
            (
                (heads * config.head_dim, config.hidden_size),
                (config.hidden_size, config.num_heads * config.head_dim),
                (2 * config.intermediate_size, config.hidden_size),
                (config.hidden_size, config.intermediate_size),
            ),
            (config.vocab_size, config.hidden_size),
            config.tie_word_embeddings,
        )

    @property
    def num_weights(self) -> int:
        """Of all linears."""
        return self.layers * sum(n * k for n, k in self.linears) + self.head[0] * self.head[1]

    def weight_bytes(self, itemsize: int, quantization: str | None) -> int:
        """All that a decode step reads of weights; the dtype has `itemsize` bytes."""
        if quantization is None:
            return self.num_weights * itemsize
        head = self.head[0] * self.head[1] * (itemsize if self.is_head_tied else 1)
        scales = 4 * (self.layers * sum(n for n, _ in self.linears))
        scales += 0 if self.is_head_tied else 4 * self.head[0]
        return self.layers * sum(n * k for n, k in self.linears) + head + scales


def product_rate(shape: Shape, rows: int, dtype: torch.dtype, threads: int, s: float) -> float:
    """Products a second at the layers' shapes: for each the better of torch's linear and ours."""
    ops = registry.select("cpu", threads=threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    took = products = 0.0
    for n, k in shape.linears:
        x, weight = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
        ours = ops.prepare_linear(weight.clone())
        ways = (partial(F.linear, x, weight), partial(ops.linear, x, ours))
        took += min(min(timed(way, s / 8)) for way in ways)
        products += 2.0 * rows * n * k
    torch.set_num_threads(before)
    return products / took


class Steps:
    """Sequences that hold `context` tokens each, and the plans that run them."""

    def __init__(self, config: EngineConfig, executor: LocalExecutor) -> None:
        self._executor = executor
        self._page_size = config.scheduler.page_size
        self._vocab = config.vocab_size
        self._next_page = 1
        self._step = 0
        self._seq = 0

    def _run(self, **parts: Any) -> None:
        self._step += 1
        fields: dict[str, Any] = {
            "removed": (),
            "added": (),
            "copies": (),
            "scheduled": (),
            **parts,
        }
        self._executor.submit(StepPlan(StepId(self._step), **fields)).result()

    def add(self, num_tokens: int, room: int) -> SeqId:
        """A sequence with random tokens and pages for `room` tokens; nothing is computed."""
        self._seq += 1
        count = -(-room // self._page_size)
        pages = tuple(PageId(self._next_page + i) for i in range(count))
        self._next_page += count
        tokens = tuple(torch.randint(3, self._vocab, (num_tokens,)).tolist())
        self._run(added=(AddedSequence(SeqId(self._seq), tokens, num_tokens, pages, GREEDY, 0),))
        return SeqId(self._seq)

    def drop_all(self) -> None:
        """Forget every sequence."""
        self._run(removed=tuple(SeqId(i + 1) for i in range(self._seq)))
        self._seq, self._next_page = 0, 1

    def prefill(self, seq_id: SeqId, num_tokens: int, chunk: int) -> None:
        """Compute its first tokens, the last one's logits included."""
        for start in range(0, num_tokens, chunk):
            new = min(chunk, num_tokens - start)
            last = start + new == num_tokens
            self._run(scheduled=(ScheduledSequence(seq_id, start, new, (), (0,) if last else ()),))

    def decode(self, seq_ids: list[SeqId], position: int) -> None:
        """One token of each, at `position`."""
        self._run(scheduled=tuple(ScheduledSequence(i, position, 1, (), (0,)) for i in seq_ids))


def row(step: str, times: list[float], least_s: list[float], bandwidth: float | None = None) -> Row:
    """A line of the table, from each step's time and the least that it could need."""
    return Row(
        step,
        round(min(times) * 1e3, 2),
        round(statistics.median(times) * 1e3, 2),
        round(statistics.median(least_s) * 1e3, 2),
        None if bandwidth is None else round(bandwidth / 1e9, 1),
        round(statistics.median(map(truediv, times, least_s)), 3),
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows, and what they are compared with."""
    options = EngineOptions(
        args.model, threads=args.threads, max_num_seqs=64, **json.loads(args.options)
    )
    config, executor = load_executor(options)
    model = read_model_config(Path(args.model))
    shape, dtype = Shape.of(model), getattr(torch, config.dtype)
    token_bytes = KVSpec(
        model.num_layers, model.num_kv_heads, model.head_dim, 1, config.kv_cache_dtype
    ).page_bytes
    steps = Steps(config, executor)
    chunk = args.chunk or config.scheduler.max_num_batched_tokens

    gc.collect()
    gc.freeze()  # as the engine's process does when it has loaded

    rate = product_rate(shape, PREFILL, dtype, config.threads, args.seconds)

    rows = []
    for batch in args.batches:
        # All sequences decode the same position over and over; it appends, but never runs further.
        seq_ids = [steps.add(args.context, args.context + 1) for _ in range(batch)]
        for seq_id in seq_ids:
            steps.prefill(seq_id, args.context, chunk)
        weight_bytes = shape.weight_bytes(dtype.itemsize, config.quantization)
        num_bytes = weight_bytes + batch * args.context * token_bytes
        products_s = batch * shape.num_weights * 2 / rate
        position = args.context
        step = partial(steps.decode, seq_ids, position)
        found = timed_beside_reading(step, args.seconds, config.threads)
        times = [took for took, _ in found]
        least = [max(num_bytes / bandwidth, products_s) for _, bandwidth in found]
        bandwidth = statistics.median(bandwidth for _, bandwidth in found)
        name = f"decode, batch {batch}, context {args.context}"
        rows.append(row(name, times, least, bandwidth))
        if args.profile == batch:
            profile = cProfile.Profile()
            profile.runcall(timed, partial(steps.decode, seq_ids, position), args.seconds)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        steps.drop_all()

    seq_id = steps.add(PREFILL, PREFILL + 1)
    layer_products = 2 * sum(n * k for n, k in shape.linears) * PREFILL
    pairs = PREFILL * (PREFILL + 1) // 2
    products = (shape.layers - 1) * (layer_products + 4 * model.num_heads * model.head_dim * pairs)
    # Of the last layer all that later tokens need are keys and values.
    products += 4 * model.num_kv_heads * model.head_dim * model.hidden_size * PREFILL
    products += 2 * shape.head[0] * shape.head[1]
    times = timed(partial(steps.prefill, seq_id, PREFILL, chunk), args.seconds)
    name = f"prefill, {PREFILL} tokens in chunks of {chunk}"
    rows.append(row(name, times, [products / rate] * len(times)))
    executor.close()
    return {
        "kernels": config.kernels,
        "threads": config.threads,
        "dtype": config.dtype,
        "product_gflop_per_s": round(rate / 1e9),
        "rows": [asdict(one) for one in rows],
    }


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--chunk", type=int, help="tokens of a prefill step; default: the engine's")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each line")
    parser.add_argument("--options", default="{}", help="more fields of EngineOptions, as JSON")
    parser.add_argument("--profile", type=int, help="print a profile of the steps of this batch")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args)
    if args.json:
        print(json.dumps(found))
        return
    print(
        f"{found['kernels']}, {found['threads']} threads, {found['dtype']}: "
        f"multiplies {found['product_gflop_per_s']} GFLOP/s"
    )
    for one in found["rows"]:
        print(
            f"{one['step']:<42} {one['best_ms']:8.2f} ms (median {one['median_ms']:8.2f}), "
            f"least {one['least_ms']:8.2f}: {one['ratio']:.2f} x"
            + (f", reads {one['gb_per_s']:.1f} GB/s" if one["gb_per_s"] else "")
        )


if __name__ == "__main__":
    main()
