"""Captured decode batches: rows are what they would be uncaptured, and nothing else is touched.

On a CPU padded with a capture that only computes again, and unpadded with the path's own; on a card
with CUDA graphs.
"""

from __future__ import annotations

import dataclasses
import random
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from checkpoints import ORIGINAL_LENGTH, case, make
from ops_paths import cpu_paths
from plan_driver import PlanDriver

from kernels import registry
from kernels.ops import Work
from kvpaging.base.config import EngineOptions
from kvpaging.base.kv_spec import KVSpec
from kvpaging.engine.engine import Engine
from kvpaging.execution.batch import DeviceBatch
from kvpaging.execution.decode_graphs import (
    EXACT,
    PADDED,
    Capture,
    DecodeGraphs,
    Sizes,
    StaticBatch,
    padded_width,
)
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.local_executor import LocalExecutor
from kvpaging.execution.model_config import read_model_config
from kvpaging.execution.models.layers import CausalLM
from kvpaging.execution.models.registry import model_class
from kvpaging.execution.weights import Checkpoint, Parameters
from kvpaging.scheduling.request import SamplingParams

CPU = torch.device("cpu")
PAGE = 4
NUM_PAGES = 200


class FakeCapture:
    """Computes again instead of replaying; what it was given runs once at once, as on a card."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed = 0

    def __call__(self, work: Work) -> Work:
        self.num_captured += 1
        work()

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            return work()

        return replay


@pytest.fixture(params=cpu_paths())
def ops(request: pytest.FixtureRequest) -> registry.Ops:
    return registry.select(CPU, prefer=request.param, threads=1)


def load(directory: Path, name: str, ops: registry.Ops) -> CausalLM:
    make(case(name), directory)
    config = read_model_config(directory)
    parameters = Parameters(Checkpoint(directory), ops, CPU, torch.float32)
    return model_class(config)(config, parameters, ORIGINAL_LENGTH)


def run(
    model: CausalLM,
    ops: registry.Ops,
    seed: int,
    capture: Capture | None,
    sizes: Sizes = PADDED,
) -> tuple[list, KVPool]:
    """Sequences that come and go, decode and prefill mixed; their samples, and the pool."""
    config = model.config
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, PAGE, "float32")
    pool = KVPool(spec, NUM_PAGES, CPU)
    pool.pages.fill_(255)  # NaN
    driver = PlanDriver(
        LocalExecutor(model, pool, ops, capture=capture, sizes=sizes),
        page_size=PAGE,
        num_pages=NUM_PAGES,
    )
    rng = random.Random(seed)
    tracks = [
        driver.track(
            [rng.randrange(3, 128) for _ in range(rng.randint(1, 40))],
            SamplingParams(max_new_tokens=99, seed=i, logprobs=2, frequency_penalty=0.3 * (i % 2)),
        )
        for i in range(11)
    ]
    for step in range(30):
        live = [track for i, track in enumerate(tracks) if i <= step <= 18 + i]
        driver.step([(track, 13) for track in live])
    return [track.samples for track in tracks], pool


@pytest.mark.parametrize("name", ["qwen3", "gemma2-old", "mixtral-window"])
def test_padded_batches_give_the_same_bits(tmp_path: Path, ops: registry.Ops, name: str) -> None:
    model = load(tmp_path, name, ops)
    plain, plain_pool = run(model, ops, 1, None)
    capture = FakeCapture()
    padded, padded_pool = run(model, ops, 1, capture)
    assert capture.num_replayed > 8 > capture.num_captured > 2
    tokens = [[sample.token_id for sample in samples] for samples in plain]
    assert [[sample.token_id for sample in samples] for samples in padded] == tokens
    if ops.exact:
        assert padded == plain
        # NaN where nothing was written, the scratch page included.
        assert torch.equal(padded_pool.pages, plain_pool.pages)
    assert bool((padded_pool.pages[0] == 255).all()), "a row that pads was stored"


@pytest.mark.parametrize("name", ["qwen3", "gemma2-old", "qwen2-tied"])
def test_the_path_s_own_capture_gives_the_same_bits(
    tmp_path: Path, ops: registry.Ops, name: str
) -> None:
    model = load(tmp_path, name, ops)
    plain, plain_pool = run(model, ops, 2, None)
    captures: list[bool] = []

    def capture(work: Work) -> Work | None:
        captured = ops.capture(work)
        captures.append(captured is not None)
        return captured

    again, again_pool = run(model, ops, 2, capture, EXACT)
    if ops.exact:
        assert captures.count(True) == len(captures) > 4
        assert again == plain
        assert torch.equal(again_pool.pages, plain_pool.pages)
    else:
        assert captures == [False], "asked again after it could not"


def test_a_mixture_is_computed_where_it_cannot_be_captured(
    tmp_path: Path, ops: registry.Ops
) -> None:
    model = load(tmp_path, "mixtral-window", ops)
    plain, _ = run(model, ops, 3, None)
    again, _ = run(model, ops, 3, ops.capture, EXACT)
    assert again == plain


def test_all_that_a_row_had_becomes_padding_again() -> None:
    def random(count: int) -> tuple[torch.Tensor, DeviceBatch]:
        numbers = torch.arange(1, count + 1)
        batch = DeviceBatch(
            token_ids=numbers,
            positions=numbers.int() + 4,
            slot_mapping=numbers + 30,
            page_tables=torch.arange(1, 3 * count + 1, dtype=torch.int32).view(count, 3),
            seq_lens=numbers.int() + 5,
            query_starts=torch.arange(count + 1, dtype=torch.int32),
            logit_rows=numbers - 1,
        )
        return torch.randn(count, 4), batch

    static, fresh = (StaticBatch(8, 64, torch.zeros(1, 4)) for _ in range(2))
    static.fill(*random(7))
    five = random(5)
    static.fill(*five)
    fresh.fill(*five)
    assert torch.equal(static.hidden, fresh.hidden)
    names = {field.name for field in dataclasses.fields(DeviceBatch)} - {"last_rows"}
    for name in names:
        assert torch.equal(getattr(static.batch, name), getattr(fresh.batch, name))


def test_rows_that_shrank_become_padding_again(tmp_path: Path, ops: registry.Ops) -> None:
    """Seven sequences, then five: the other rows of the eight neither store nor read pages."""
    model = load(tmp_path, "qwen3", ops)
    config = model.config
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, PAGE, "float32")
    pool = KVPool(spec, NUM_PAGES, CPU)
    pool.pages.zero_()
    capture = FakeCapture()
    driver = PlanDriver(
        LocalExecutor(model, pool, ops, capture=capture), page_size=PAGE, num_pages=NUM_PAGES
    )
    tracks = [driver.track([5 + i, 6, 7]) for i in range(7)]
    driver.step([(track, 3) for track in tracks])
    driver.step([(track, 1) for track in tracks])
    gone = [page for track in tracks[5:] for page in track.pages]
    pool.pages[gone] = 255
    driver.step([(track, 1) for track in tracks[:5]])
    assert capture.num_captured == 1
    assert bool((pool.pages[gone] == 255).all()), "a row that left was stored again"
    assert all(len(track.output) == 3 for track in tracks[:5])


def test_the_ladder_holds_every_batch_and_is_short() -> None:
    sizes = [PADDED.size_for(count) for count in range(1, PADDED.most + 1)]
    assert all(size >= count for count, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert sizes[-1] == PADDED.most
    assert len(set(sizes)) == 36
    assert [EXACT.size_for(count) for count in (1, 3, 17)] == [1, 3, 17]
    assert [padded_width(pages) for pages in (1, 64, 65, 128, 1000)] == [64, 64, 128, 128, 1024]


def test_a_batch_beyond_the_ladder_is_not_captured(tmp_path: Path, ops: registry.Ops) -> None:
    model = load(tmp_path, "qwen3", ops)
    pool = KVPool(KVSpec(1, 1, 8, 4, "float32"), 1, CPU)
    graphs = DecodeGraphs(model, pool, FakeCapture(), PADDED)
    assert graphs.fits(PADDED.most)
    assert not graphs.fits(PADDED.most + 1)


class ShortOfMemory(FakeCapture):
    """As a card does it: the work is begun, then there is no room for one more capture."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.num_refused = 0

    def __call__(self, work: Work) -> Work | None:
        if self.num_captured < self.most:
            return super().__call__(work)
        work()
        self.num_refused += 1
        return None


def test_when_nothing_can_be_captured_steps_have_the_same_bits(
    tmp_path: Path, ops: registry.Ops
) -> None:
    model = load(tmp_path, "qwen3", ops)
    plain, plain_pool = run(model, ops, 1, None)
    capture = ShortOfMemory(0)
    short, short_pool = run(model, ops, 1, capture)
    assert capture.num_refused == 1, "asked again"
    if ops.exact:
        assert short == plain
        assert torch.equal(short_pool.pages, plain_pool.pages)


def third_token(count: int) -> DeviceBatch:
    """Of `count` sequences, each in a page of its own."""
    numbers = torch.arange(1, count + 1)
    return DeviceBatch(
        token_ids=numbers + 4,
        positions=numbers.int() * 0 + 2,
        slot_mapping=numbers * PAGE + 2,
        page_tables=numbers.int()[:, None],
        seq_lens=numbers.int() * 0 + 3,
        query_starts=torch.arange(count + 1, dtype=torch.int32),
        logit_rows=numbers - 1,
    )


def graphs_of(tmp_path: Path, ops: registry.Ops, capture: Capture, kept: int) -> DecodeGraphs:
    model = load(tmp_path, "qwen3", ops)
    config = model.config
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, PAGE, "float32")
    pool = KVPool(spec, NUM_PAGES, CPU)
    pool.pages.zero_()
    return DecodeGraphs(model, pool, capture, Sizes(int, most=8, kept=kept))


def test_what_was_captured_before_one_failed_is_still_used(
    tmp_path: Path, ops: registry.Ops
) -> None:
    capture = ShortOfMemory(1)
    graphs = graphs_of(tmp_path, ops, capture, 8)
    first = graphs.hidden(third_token(1)).clone()
    for count in (2, 3, 1):
        assert graphs.fits(count)
        row = graphs.hidden(third_token(count))[:1]
        if ops.exact:
            assert torch.equal(row, first)
    assert (capture.num_refused, capture.num_replayed) == (1, 2)


def test_shapes_that_are_not_used_give_way(tmp_path: Path, ops: registry.Ops) -> None:
    capture = FakeCapture()
    graphs = graphs_of(tmp_path, ops, capture, 2)
    first = graphs.hidden(third_token(1)).clone()
    for count in (2, 1, 3):  # the shape of two rows is now the older one
        graphs.hidden(third_token(count))
    assert graphs.shapes == ((1, 64), (3, 64))
    assert capture.num_captured == 3
    graphs.hidden(third_token(2))
    assert graphs.shapes == ((3, 64), (2, 64))
    assert torch.equal(graphs.hidden(third_token(1)), first)
    assert capture.num_captured == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_steps_and_plans_made_ahead_change_nothing_on_a_card(dtype: str) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(10, 6000) for _ in range(rng.randint(1, 300))] for _ in range(21)]
    sampling = SamplingParams(max_new_tokens=40, seed=3, logprobs=3, frequency_penalty=0.2)
    said = []
    for eager in (True, False):
        for ahead in (False, True):
            options = EngineOptions(
                model=str(files("kvpaging") / "demo_model"),
                device="cuda",
                dtype=dtype,
                max_num_seqs=32,
                kv_cache_memory_bytes=1 << 28,
                enforce_eager=eager,
                async_scheduling=ahead,
            )
            engine = Engine.from_options(options)
            answers = engine.generate(prompts, sampling)
            said.append([completion.samples for [completion] in answers])
            engine.close()
    assert all(each == said[0] for each in said)
