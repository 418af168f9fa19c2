"""Whole steps of Llama-3-8B's shape on this machine's card, beside the least that they could take.

    PYTHONPATH=. python benchmarks/gpu/step.py [--out step.json] [--no-exact]

Weights are random and made where they lie, so no file of 16 GB is needed. Needs what the package
itself does; with transformers installed, its continuous batching runs the same weights and prompts.

`least` is the sum over a step's operations of the larger of their bytes over the measured copy
bandwidth and their products over the measured matrix rate. Decode steps go through the executor as
the engine's do, two plans held, sampling included; keys and values are random, since their values
cost nothing. Ends within eight minutes. What fails is a row that says so, and exit status 1.
`--tiny` runs all of it on a CPU, to find mistakes; its times mean nothing.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from model_shapes import COMMON, SHAPES, parameters
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

from kernels import registry
from kvpaging.base.config import EngineConfig, SchedulerConfig
from kvpaging.base.ids import PageId, SeqId, StepId
from kvpaging.base.kv_spec import KVSpec
from kvpaging.engine.engine import Engine
from kvpaging.execution.decode_graphs import EXACT, PADDED
from kvpaging.execution.executor import RunningStep
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.local_executor import LocalExecutor
from kvpaging.execution.model_config import ModelConfig, read_model_config
from kvpaging.execution.models.registry import model_class
from kvpaging.execution.weights import Checkpoint, Parameters
from kvpaging.scheduling.plan import AddedSequence, ScheduledSequence, StepPlan
from kvpaging.scheduling.request import SamplingParams

PAGE_SIZE = 16
DTYPE = torch.bfloat16
GREEDY = SamplingParams(max_new_tokens=1, seed=0, temperature=0.0)
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 128,
}


# --- the model ------------------------------------------------------------------------------------


class RandomCheckpoint(Checkpoint):
    """The weights of a configuration, drawn as they are asked for: the same ones at each time."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self._shapes = dict(parameters(raw))

    @property
    def names(self) -> frozenset[str]:
        """All tensors' names."""
        return frozenset(self._shapes)

    @property
    def num_bytes(self) -> int:
        """What a file would hold."""
        return sum(torch.Size(shape).numel() for shape in self._shapes.values()) * DTYPE.itemsize

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Its shape, `None` where there is no such tensor."""
        return self._shapes.get(name)

    def copy(self, name: str, target: torch.Tensor) -> tuple[int, str]:
        """Fill `target`: ones for norms, else normal numbers from a seed of the name's."""
        if target.dim() == 1:
            target.fill_(1.0)
        else:
            seed = torch.Generator(target.device).manual_seed(zlib.crc32(name.encode()))
            target.normal_(0.0, target.shape[1] ** -0.5, generator=seed)
        return target.numel() * target.element_size(), name


class Subject(NamedTuple):
    """What is measured."""

    raw: dict[str, Any]
    """config.json."""
    config: ModelConfig
    executor: LocalExecutor
    engine_config: EngineConfig


def load(machine: Machine, raw: dict[str, Any], num_tokens: int, *, exact: bool) -> Subject:
    """The model with random weights, and a pool of random numbers for so many tokens, or fewer."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(raw))
        config = read_model_config(Path(directory))
    device = torch.device(machine.device)
    ops = registry.select(device, exact=exact)
    max_model_len = config.max_model_len
    spec = KVSpec(
        config.num_layers, config.num_kv_heads, config.head_dim, PAGE_SIZE, str(DTYPE)[6:]
    )
    weights = RandomCheckpoint(raw)
    taken = Parameters(weights, ops, device, DTYPE)
    with torch.inference_mode():
        model = model_class(config)(config, taken, max_model_len)
        identity = taken.finish(model.ignored_tensors())
        num_pages = min(spec.pages_for(num_tokens), room_bytes(device) // spec.page_bytes)
        pool = KVPool(spec, num_pages, device)
        for first in range(0, num_pages + 1, 1024):
            pool.pages[first : first + 1024].view(DTYPE).normal_()
    on_card = device.type == "cuda"
    engine_config = EngineConfig(
        model_dir="",
        architecture=config.architecture,
        device=str(device),
        dtype=spec.dtype,
        kv_cache_dtype=spec.dtype,
        threads=1,
        kernels=ops.name,
        exact=ops.exact,
        kv_cache_bytes=pool.num_bytes,
        vocab_size=config.vocab_size,
        eos_token_ids=(),  # so that every answer is as long as it may be
        scheduler=SchedulerConfig(
            num_pages, PAGE_SIZE, 256, 8192, max_model_len, 1024, prefix_cache=False
        ),
        async_scheduling=on_card,
        numerics_identity=identity,
    )
    executor = LocalExecutor(
        model,
        pool,
        ops,
        async_scheduling=on_card,
        capture=ops.capture,
        sizes=PADDED if on_card else EXACT,
    )
    return Subject(raw, config, executor, engine_config)


def room_bytes(device: torch.device) -> int:
    """For pages: what is free, but for an eighth to compute in."""
    if device.type == "cpu":
        return 1 << 30
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - total // 8)


# --- decode steps ---------------------------------------------------------------------------------


class Operation(NamedTuple):
    """One of a step's, by what it cannot do without."""

    name: str
    num_bytes: float
    flop: float


def decode_operations(config: ModelConfig, batch: int, context: int) -> Iterator[Operation]:
    """One token of each of `batch` sequences that see `context` keys, in a dense model."""
    size, hidden, inner = DTYPE.itemsize, config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim

    def product(name: str, out_features: int, in_features: int, out_size: int = size) -> Operation:
        moved = size * (out_features * in_features + batch * in_features)
        flop = 2.0 * batch * out_features * in_features
        return Operation(name, moved + out_size * batch * out_features, flop)

    norm = Operation("norm", 4.0 * size * batch * hidden, 0.0)
    yield Operation("embedding", 2.0 * size * batch * hidden, 0.0)
    for _ in range(config.num_layers):
        yield norm
        yield product("qkv", queries + 2 * keys, hidden)
        yield Operation("rope and store", 2.0 * size * batch * (queries + 2 * keys), 0.0)
        yield Operation(
            "attention",
            2.0 * size * batch * (context * keys + queries),
            4.0 * batch * context * queries,
        )
        yield product("output", hidden, queries)
        yield norm
        yield product("gate_up", 2 * inner, hidden)
        yield Operation("activation", 3.0 * size * batch * inner, 0.0)
        yield product("down", hidden, inner)
    yield norm
    yield product("head", config.vocab_size, hidden, out_size=4)
    yield Operation("sampling", 4.0 * batch * config.vocab_size, 0.0)


def least_ms(machine: Machine, operations: Iterator[Operation]) -> float:
    """What this machine needs at least for all of them, one after the other."""
    return sum(
        max(one.num_bytes / machine.copy_gb_s / 1e6, one.flop / machine.matrix_tflop_s / 1e9)
        for one in operations
    )


class Steps:
    """Sequences in pages of their own, and the plans that decode them, two held at a time."""

    def __init__(self, subject: Subject, batch: int, context: int) -> None:
        self._executor = subject.executor
        self._step = 0
        count = context // PAGE_SIZE + 1
        order = torch.randperm(batch * count).view(batch, count) + 1
        tokens = torch.randint(3, subject.config.vocab_size, (batch, context)).tolist()
        self._seq_ids = [SeqId(index + 1) for index in range(batch)]
        self._position = context - 1
        added = tuple(
            AddedSequence(
                seq_id, tuple(own), context, tuple(PageId(page) for page in pages), GREEDY, 0
            )
            for seq_id, own, pages in zip(self._seq_ids, tokens, order.tolist(), strict=True)
        )
        self._submit(added=added).result()

    def _submit(self, **parts: Any) -> RunningStep:
        self._step += 1
        fields: dict[str, Any] = {"removed": (), "added": (), "copies": (), "scheduled": ()}
        return self._executor.submit(StepPlan(StepId(self._step), **{**fields, **parts}))

    def run(self, count: int) -> float:
        """Seconds for each of so many steps: all sequences, the same position over and over."""
        scheduled = tuple(
            ScheduledSequence(seq_id, self._position, 1, (), (0,)) for seq_id in self._seq_ids
        )
        begin = time.perf_counter()
        held = self._submit(scheduled=scheduled)
        for _ in range(count - 1):
            following = self._submit(scheduled=scheduled)
            held.result()
            held = following
        held.result()
        return (time.perf_counter() - begin) / count

    def drop(self) -> None:
        """Forget the sequences."""
        self._submit(removed=tuple(self._seq_ids)).result()


def bench_decode(machine: Machine, subject: Subject) -> Iterator[Row]:
    """Decode at batch 1, 32 and 256."""
    context = machine.pick(2048, 40)
    most = subject.engine_config.scheduler.num_pages // (context // PAGE_SIZE + 1)
    for batch in machine.pick((1, 32, 256), (1, 3)):
        if batch > most:
            yield {"decode, batch": batch, "context": context, "skipped": f"room for {most}"}
            continue

        def measure(batch: int = batch) -> Row:
            steps = Steps(subject, batch, context)
            try:
                steps.run(3)  # compiles and captures
                took_ms = 1e3 * statistics.median(steps.run(10) for _ in range(7))
            finally:
                steps.drop()
            least = least_ms(machine, decode_operations(subject.config, batch, context))
            return {
                "step ms": took_ms,
                "least ms": least,
                "least / step %": 100 * least / took_ms,
                "tokens/s": 1e3 * batch / took_ms,
            }

        yield attempt({"decode, batch": batch, "context": context}, measure)


# --- throughput beside transformers ---------------------------------------------------------------


class Load(NamedTuple):
    """Prompts that are all there at the start, and how long each answer is."""

    prompts: list[list[int]]
    num_new_tokens: int

    @staticmethod
    def of(machine: Machine, vocab_size: int) -> Load:
        """64 prompts of 1,024 tokens."""
        count, length, new = machine.pick((64, 1024, 128), (3, 20, 4))
        random = torch.Generator().manual_seed(1)
        prompts = torch.randint(3, vocab_size, (count, length), generator=random)
        return Load(prompts.tolist(), new)

    def row(self, took_s: float) -> Row:
        """Its rates."""
        new = len(self.prompts) * self.num_new_tokens
        return {
            "prompts": len(self.prompts),
            "tokens in": len(self.prompts[0]),
            "tokens out": self.num_new_tokens,
            "s": took_s,
            "new tokens/s": new / took_s,
        }


Answers = list[list[int]]


def answers_of_engine(machine: Machine, engine: Engine, load: Load) -> tuple[float, Answers]:
    """Seconds, and the tokens."""
    machine.synchronize()
    begin = time.perf_counter()
    sampling = SamplingParams(max_new_tokens=load.num_new_tokens, seed=0, temperature=0.0)
    completions = engine.generate(load.prompts, sampling)
    machine.synchronize()
    return time.perf_counter() - begin, [one.token_ids for [one] in completions]


def answers_of_transformers(
    machine: Machine, raw: dict[str, Any], load: Load
) -> tuple[float, Answers]:
    """The same by `generate_batch` with the same weights; what it warms up is not counted."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    more: dict[str, Any] = {}
    if machine.is_tiny:  # its own choice is most of the machine's memory
        from transformers import ContinuousBatchingConfig

        more["continuous_batching_config"] = ContinuousBatchingConfig(
            num_blocks=32, max_batch_tokens=64
        )
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(raw))
        config = AutoConfig.from_pretrained(directory)
    with torch.device(machine.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()  # type: ignore[no-untyped-call]
    weights = RandomCheckpoint(raw)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weights.copy(name, parameter)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=load.num_new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    took_s, answers = 0.0, []
    for prompts in (load.prompts[:2], load.prompts):
        found = model.generate_batch(inputs=prompts, generation_config=settings, **more)
        done = list(found.values())
        answers = [one.generated_tokens for one in done]
        if failed := [one.error for one in done if one.error]:
            raise RuntimeError(failed[0])
        took_s = max(one.lifespan[1] for one in done) - min(one.created_time for one in done)
    if [len(answer) for answer in answers] != [load.num_new_tokens] * len(load.prompts):
        raise RuntimeError(f"{len(answers)} answers of {len(load.prompts)}, or too short ones")
    return took_s, answers


def what_transformers_lacks() -> str | None:
    """Why it can't be compared with, if it can't."""
    if importlib.util.find_spec("transformers") is None:
        return "not installed"
    from transformers import GenerationMixin, __version__

    return None if hasattr(GenerationMixin, "generate_batch") else f"{__version__} is too old"


def bench_throughput(machine: Machine, subject: Subject) -> Iterator[Row]:
    """Ours, then transformers' with ours out of memory."""
    load = Load.of(machine, subject.config.vocab_size)
    answers: dict[str, Answers] = {}

    def ours() -> Row:
        engine = Engine(subject.engine_config, subject.executor)
        answers_of_engine(machine, engine, load._replace(num_new_tokens=3))  # compiles, captures
        took_s, answers["ours"] = answers_of_engine(machine, engine, load)
        return load.row(took_s)

    def theirs() -> Row:
        took_s, answers["theirs"] = answers_of_transformers(machine, subject.raw, load)
        return load.row(took_s)

    yield attempt({"throughput": "kvpaging"}, ours)
    subject.executor.close()
    gc.collect()
    if machine.device == "cuda":
        torch.cuda.empty_cache()
    if (missing := what_transformers_lacks()) is not None:
        yield {"throughput": "transformers", "skipped": missing}
        return
    yield attempt({"throughput": "transformers"}, theirs)
    if len(answers) == 2:
        first = [a[0] == b[0] for a, b in zip(answers["ours"], answers["theirs"], strict=True)]
        yield {"throughput": "first tokens alike", "of": len(first), "alike": sum(first)}


# --- the run --------------------------------------------------------------------------------------


def main() -> int:
    """Measure the steps, then the throughput. 1 where anything failed."""
    parser = parser_for(__doc__, "step.json")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--no-exact", action="store_true", help="linears of the vendor's library")
    options = parser.parse_args()
    began = time.monotonic()

    machine, results = begin(is_tiny=options.tiny)
    raw = {**COMMON, **SHAPES[options.shape], "vocab_size": options.vocab}
    if options.tiny:
        raw.update(TINY)
    subject = load(machine, raw, machine.pick(256 * 2080, 1024), exact=not options.no_exact)
    results["machine"][0]["kernels"] = subject.engine_config.kernels
    for title, rows in results.items():
        print_table(title, rows)
    for title, part in (("decode", bench_decode), ("throughput", bench_throughput)):
        results[title] = []
        if time.monotonic() - began > TIME_LIMIT_S:
            results[title] = [{FAILED: "out of time"}]
        else:
            results[title].extend(part(machine, subject))
        print_table(title, results[title])
    return finish(results, options.out)


if __name__ == "__main__":
    sys.exit(main())
