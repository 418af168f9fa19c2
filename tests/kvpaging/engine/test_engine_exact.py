"""Cached equals computed: a request's tokens and logprobs, bit for bit, whatever happens around it.

Each test asserts that its hit, preemption, chunk or batch mate really happened. Prompts and
parameters are drawn afresh; the seed is part of the test's name.
"""

from __future__ import annotations

import os
import random
import secrets
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import msgspec
import pytest

from kernels import registry
from kvpaging.base.config import EngineOptions
from kvpaging.base.ids import RequestId
from kvpaging.engine.engine import Completion, Engine
from kvpaging.scheduling.events import Arrival
from kvpaging.scheduling.outputs import StepOutputs
from kvpaging.scheduling.plan import Sample
from kvpaging.scheduling.request import Request, SamplingParams

DEMO_MODEL = str(files("kvpaging") / "demo_model")
# A byte an entry, and 4 bytes of scale for 64 entries.
ENTRY_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / 64}
# Afresh in each run, and the same in all of its workers: it is part of the tests' names.
SEED = zlib.crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", secrets.token_hex(8)).encode())

pytestmark = pytest.mark.skipif(
    not any(path.name == "native" and path.available for path in registry.describe()),
    reason="the native kernels are not there, and plain torch does not promise exactness",
)


@contextmanager
def engine(dtype: str = "float32", num_pages: int = 256, **changes: object) -> Iterator[Engine]:
    """`dtype` is that of the pages; with `int8` the model computes in bfloat16."""
    options = EngineOptions(
        model=DEMO_MODEL,
        device="cpu",
        kernels="native",
        dtype="bfloat16" if dtype == "int8" else dtype,
        kv_cache_dtype=dtype,
        max_num_seqs=8,
        threads=2,
    )
    page_size = changes.get("page_size", 16)
    kv_bytes = int((num_pages + 1) * 8 * 2 * 2 * page_size * 64 * ENTRY_BYTES[dtype])  # type: ignore[operator]
    defaults = {"kv_cache_memory_bytes": kv_bytes, "max_num_batched_tokens": 64}
    made = Engine.from_options(type(options)(**(_fields(options) | defaults | changes)))
    try:
        yield made
    finally:
        made.close()


def _fields(options: EngineOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in options.__struct_fields__}


def prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(10, 6000) for _ in range(length))


def sampling(rng: random.Random, max_new: int = 12) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=max_new,
        seed=rng.getrandbits(64),
        temperature=rng.choice([0.0, 0.7, 1.3]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        ignore_eos=True,
        logprobs=3,
    )


def run(engine: Engine, requests: Sequence[Request]) -> dict[RequestId, list[Sample]]:
    """Run the requests together; everything that each output 0 got."""
    got: dict[RequestId, list[Sample]] = {request.request_id: [] for request in requests}

    def take(outputs: StepOutputs) -> None:
        assert not outputs.rejections
        for output in outputs.outputs:
            got[output.request_id].extend(output.samples)

    take(engine.step([Arrival(request) for request in requests]))
    while engine.has_work:
        take(engine.step())
    return got


def alone(engine: Engine, tokens: Sequence[int], params: SamplingParams) -> Completion:
    [[completion]] = engine.generate([tokens], params)
    return completion


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("seed", [SEED])
def test_batch_mates_change_nothing(dtype: str, seed: int) -> None:
    rng = random.Random(seed)
    tokens, params = prompt(rng, 90), sampling(rng)
    with engine(dtype) as one:
        reference = alone(one, tokens, params).samples
    requests = [Request(RequestId("it"), tokens, params)] + [
        Request(RequestId(f"{i}"), prompt(rng, rng.randint(1, 120)), sampling(rng, 20))
        for i in range(7)
    ]
    rng.shuffle(requests)
    with engine(dtype) as crowd:
        most = 0
        got = run(crowd, requests)
        most = max(most, crowd.stats().step_id)
        assert got[RequestId("it")] == reference
        assert most < 8 * 20, "they did not run together"


@pytest.mark.parametrize("seed", [SEED])
def test_a_prefix_hit_changes_nothing(dtype: str, seed: int) -> None:
    rng = random.Random(seed)
    tokens, params = prompt(rng, 100), sampling(rng, 20)
    with engine(dtype) as warm:
        cold = alone(warm, tokens, params)
        hit = alone(warm, tokens, params)
        assert cold.num_cached_tokens == 0
        assert hit.num_cached_tokens == 96
        assert hit.samples == cold.samples
        # A longer prompt that begins with generated text, from generated pages and cold.
        longer, more = [*tokens, *cold.token_ids, *prompt(rng, 9)], sampling(rng)
        continued = alone(warm, longer, more)
        assert continued.num_cached_tokens == 112
    with engine(dtype, prefix_cache=False) as without:
        computed = alone(without, longer, more)
        assert computed.num_cached_tokens == 0
        assert computed.samples == continued.samples


@pytest.mark.parametrize("seed", [SEED])
def test_mates_with_the_same_beginning_change_nothing(dtype: str, seed: int) -> None:
    """Beginnings of one and of two splits, whose pages are attended to together."""
    rng = random.Random(seed)
    common, num_new = prompt(rng, 544), 16
    requests = [
        Request(RequestId(f"{i}"), common[:end] + prompt(rng, 5 + i), sampling(rng, num_new))
        for i, end in enumerate((544, 304, 544, 304, 544, 304))
    ]
    with engine(dtype, prefix_cache=False) as one:
        reference = {
            r.request_id: alone(one, r.prompt_token_ids, r.sampling).samples for r in requests
        }
    # Room for the beginning once, and two pages of each request's own.
    with engine(dtype, num_pages=34 + 2 * 6, max_model_len=640) as crowd:
        alone(crowd, common, sampling(rng, 1))
        before = crowd.stats().step_id
        assert run(crowd, requests) == reference
        assert crowd.stats().num_preemptions == 0
        assert crowd.stats().step_id - before < 2 * num_new, "they did not run together"


@pytest.mark.parametrize("budget", [8, 13, 50, 512])
@pytest.mark.parametrize("seed", [SEED])
def test_chunks_and_page_sizes_change_nothing(dtype: str, budget: int, seed: int) -> None:
    rng = random.Random(seed)
    tokens, params = prompt(rng, 300), sampling(rng)
    page_size = rng.choice([4, 64])
    with engine(dtype, max_num_batched_tokens=512) as whole:
        reference = alone(whole, tokens, params).samples
    with engine(dtype, max_num_batched_tokens=budget, page_size=page_size) as chunked:
        assert alone(chunked, tokens, params).samples == reference
        num_steps = -(-300 // budget) + 12 - 1
        assert chunked.stats().step_id in (num_steps, num_steps + 1)


@pytest.mark.parametrize("seed", [SEED])
def test_preemption_changes_nothing(dtype: str, seed: int) -> None:
    rng = random.Random(seed)
    requests = [Request(RequestId(f"{i}"), prompt(rng, 40), sampling(rng, 60)) for i in range(4)]
    with engine(dtype) as roomy:
        reference = {
            r.request_id: alone(roomy, r.prompt_token_ids, r.sampling).samples for r in requests
        }
    with engine(dtype, num_pages=14, max_model_len=128) as tight:
        assert run(tight, requests) == reference
        assert tight.stats().num_preemptions > 0
        assert tight.stats().num_recomputed_tokens > 0


@pytest.mark.parametrize("seed", [SEED])
def test_a_prompt_is_scored_as_it_was_sampled(dtype: str, seed: int) -> None:
    """Whole, in chunks, beside others, preempted: one score for each token, always the same."""
    rng = random.Random(seed)
    params = msgspec.structs.replace(sampling(rng, 20), prompt_logprobs=3)
    tokens = prompt(rng, 150)
    with engine(dtype, max_num_batched_tokens=512) as whole:
        first = alone(whole, tokens, params)
        turn = (*tokens, *first.token_ids)
        reference = alone(whole, turn, params)
    assert reference.num_cached_tokens == 0
    # What was said of a token when it was sampled, by decoding, is said of it as a prompt's token.
    assert reference.prompt_samples == [*first.prompt_samples, *first.samples]
    with engine(dtype, max_num_batched_tokens=24) as crowd:
        for [completion] in crowd.generate([turn, prompt(rng, 30), turn], params)[::2]:
            assert completion.prompt_samples == reference.prompt_samples
            assert completion.samples == reference.samples
    # Seven tokens a step: when most are scored, the one before it takes its pages.
    grows, scored = RequestId("grows"), RequestId("scored")
    with engine(dtype, max_num_batched_tokens=8, num_pages=13, max_model_len=200) as tight:
        orders = [Request(grows, prompt(rng, 10), sampling(rng, 60)), Request(scored, turn, params)]
        scores: list[Sample] = []
        outputs = tight.step([Arrival(order) for order in orders])
        while tight.has_work or outputs.outputs:
            for output in outputs.outputs:
                scores += output.prompt_samples
            outputs = tight.step()
            if tight.stats().num_preemptions == 0:
                num_before = len(scores)
        assert 100 < num_before < len(turn) - 1
        assert tight.stats().num_recomputed_tokens > 100
    assert scores == reference.prompt_samples


@pytest.mark.parametrize("seed", [SEED])
def test_pages_that_went_down_and_came_back_change_nothing(dtype: str, seed: int) -> None:
    rng = random.Random(seed)
    tokens, params = prompt(rng, 300), sampling(rng)
    with engine(dtype, num_pages=24, max_model_len=384, host_cache_bytes=1 << 28) as it:
        cold = alone(it, tokens, params)
        for _ in range(2):  # others need all of the pool
            alone(it, prompt(rng, 350), sampling(rng))
        back = alone(it, tokens, params)
        stats = it.stats()
        assert cold.num_cached_tokens == 0
        assert back.num_cached_tokens == 288
        assert stats.num_loaded_pages >= 18
        assert back.samples == cold.samples


@pytest.mark.parametrize("seed", [SEED])
def test_pages_on_disk_survive_the_engine_and_change_nothing(
    dtype: str, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    tokens, params = prompt(rng, 300), sampling(rng)
    with engine(dtype, disk_cache_dir=str(tmp_path / "pages")) as first:
        cold = alone(first, tokens, params)
    with engine(dtype, disk_cache_dir=str(tmp_path / "pages")) as second:
        warm = alone(second, tokens, params)
        assert second.stats().num_loaded_pages == 18
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 288)
    assert warm.samples == cold.samples
    # Another page size is another way to lay out the same tokens: nothing of it is found.
    with engine(dtype, disk_cache_dir=str(tmp_path / "pages"), page_size=8) as other:
        again = alone(other, tokens, params)
        assert again.num_cached_tokens == 0
    assert again.samples == cold.samples


@pytest.mark.parametrize("seed", [SEED])
def test_threads_change_nothing(dtype: str, seed: int) -> None:
    rng = random.Random(seed)
    tokens, params = prompt(rng, 200), sampling(rng)
    samples = []
    for threads in (1, 2):
        with engine(dtype, threads=threads) as it:
            samples.append(alone(it, tokens, params).samples)
    assert samples[0] == samples[1]


@pytest.mark.parametrize("seed", [SEED])
def test_planning_ahead_changes_nothing(dtype: str, seed: int) -> None:
    """Batched, preempted, with edits of logits that follow what was sampled, and ends by token."""
    rng = random.Random(seed)
    prompts = [prompt(rng, 40) for _ in range(7)]
    params = [sampling(rng, 60) for _ in prompts]
    with engine(dtype) as plain:
        free = [alone(plain, *order) for order in zip(prompts, params, strict=True)]
    stop = free[0].token_ids[rng.randint(20, 40)]
    params = [msgspec.structs.replace(one, prompt_logprobs=2) for one in params]
    params[0] = msgspec.structs.replace(params[0], stop_token_ids=(stop,))
    orders = [
        Request(RequestId(f"{i}"), *order)
        for i, order in enumerate(zip(prompts, params, strict=True))
    ]
    got = []
    for ahead in (False, True):
        with engine(dtype, num_pages=14, max_model_len=128, async_scheduling=ahead) as tight:
            got.append(run(tight, orders))
            assert tight.stats().num_preemptions > 0
            assert tight.stats().num_held_pages == 0
    assert got[0] == got[1]
    assert len(got[0][RequestId("0")]) < 60


@pytest.mark.parametrize("seed", [SEED])
def test_each_of_n_outputs_is_what_it_would_be_alone(dtype: str, seed: int) -> None:
    rng = random.Random(seed)
    tokens = prompt(rng, 21)
    params = SamplingParams(
        max_new_tokens=12, seed=rng.getrandbits(64), ignore_eos=True, logprobs=1
    )
    with engine(dtype) as it:
        [[first]] = it.generate([tokens], params)
        [outputs] = it.generate([tokens], params, n=3)
        assert outputs[0].samples == first.samples
        assert len({tuple(output.token_ids) for output in outputs}) == 3
    with engine(dtype, num_pages=3, max_model_len=40) as tight:
        [squeezed] = tight.generate([tokens], params, n=3)
        assert [o.samples for o in squeezed] == [o.samples for o in outputs]
        assert tight.stats().num_recomputed_tokens > 0
