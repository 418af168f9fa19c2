"""Plans as the scheduler would make them: forks, copies, preemption, failure, closing."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest
import torch
from checkpoints import ORIGINAL_LENGTH, case, make
from ops_paths import cpu_paths
from plan_driver import GREEDY, PlanDriver, RecordingModel, Track

from kernels import registry
from kvpaging.base.errors import LawBroken
from kvpaging.base.ids import SeqId, StepId
from kvpaging.base.kv_spec import KVSpec
from kvpaging.execution import local_executor, transfer
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.local_executor import LocalExecutor
from kvpaging.execution.model_config import read_model_config
from kvpaging.execution.model_runner import SCORED_ROWS
from kvpaging.execution.models.layers import CausalLM
from kvpaging.execution.models.registry import model_class
from kvpaging.execution.weights import Checkpoint, Parameters
from kvpaging.scheduling.plan import StepPlan
from kvpaging.scheduling.request import SamplingParams

CPU = torch.device("cpu")
PAGE = 8
NUM_PAGES = 120
PROMPT = [(5 * i + 2) % 128 for i in range(21)]
RANDOM = SamplingParams(max_new_tokens=100, seed=2**63 + 11, temperature=1.0, logprobs=3)


@pytest.fixture(scope="module", params=cpu_paths())
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CausalLM, registry.Ops]:
    directory: Path = tmp_path_factory.mktemp("checkpoint")
    make(case("llama-gqa"), directory)
    config = read_model_config(directory)
    ops = registry.select(CPU, prefer=request.param, threads=1)
    parameters = Parameters(Checkpoint(directory), ops, CPU, torch.float32)
    return model_class(config)(config, parameters, ORIGINAL_LENGTH), ops


@pytest.fixture
def driver(loaded: tuple[CausalLM, registry.Ops]) -> PlanDriver:
    return driver_of(*loaded)


def driver_of(model: CausalLM, ops: registry.Ops, seed: int = 0) -> PlanDriver:
    config = model.config
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, PAGE, "float32")
    pool = KVPool(spec, NUM_PAGES, CPU)
    pool.pages.fill_(255)  # NaN
    recording = RecordingModel(model)
    return PlanDriver(
        LocalExecutor(recording, pool, ops),
        page_size=PAGE,
        num_pages=NUM_PAGES,
        recording=recording,
        seed=seed,
    )


def close_to(found: Track, expected: Track) -> None:
    """The same tokens, and logits as close as a path that is not exact gives them."""
    assert found.output == expected.output
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


def test_batch_mates_chunks_and_pages_change_nothing(
    loaded: tuple[CausalLM, registry.Ops],
) -> None:
    alone = driver_of(*loaded)
    expected = alone.track(PROMPT, RANDOM)
    alone.finish([expected], 30)
    together = driver_of(*loaded, seed=1)
    track = together.track(PROMPT, RANDOM)
    mates = [together.track([3 + i, 1, 4, 1, 5] * (i + 1), RANDOM) for i in range(3)]
    together.finish([*mates, track], 30, chunk=6)
    close_to(track, expected)
    if loaded[1].exact:
        assert track.samples == expected.samples


def test_a_preempted_sequence_goes_on_as_if_it_had_not_been(
    driver: PlanDriver, loaded: tuple[CausalLM, registry.Ops]
) -> None:
    sampling = msgspec.structs.replace(RANDOM, frequency_penalty=0.7, min_new_tokens=12)
    undisturbed = driver_of(*loaded)
    expected = undisturbed.track(PROMPT, sampling)
    undisturbed.finish([expected], 20)
    track, mate = driver.track(PROMPT, sampling), driver.track([1, 2, 3])
    driver.finish([track, mate], 9, chunk=10)
    driver.drop(track)
    driver.finish([mate, track], 20, chunk=10)
    close_to(track, expected)


def test_a_fork_shares_pages_and_copies_the_tail(
    driver: PlanDriver, loaded: tuple[CausalLM, registry.Ops]
) -> None:
    first = driver.track(PROMPT, RANDOM)
    result = driver.step([(first, 100)], {first.seq_id: (0, 1, 2)})
    samples = result.samples[0]
    assert len(samples) == 3
    twins = [first]
    for output_index in (1, 2):
        twin = driver.track(PROMPT, RANDOM, output_index)
        twin.output = [samples[output_index].token_id]
        twin.samples = [samples[output_index]]
        twin.num_computed = len(PROMPT)
        full = len(PROMPT) // PAGE
        (tail,) = driver.take_pages(1)
        driver.copy(first.pages[full], tail)
        twin.pages = [*first.pages[:full], tail]
        twins.append(twin)
    for _ in range(15):
        driver.step([(twin, 1) for twin in twins])

    assert len({tuple(twin.output) for twin in twins}) == 3, "random numbers of their own"
    for output_index, twin in enumerate(twins):
        other = driver_of(*loaded)
        lonely = other.track(PROMPT, RANDOM, output_index)
        other.finish([lonely], len(twin.output))
        assert lonely.output == twin.output


def test_a_sequence_that_is_no_number_fails_and_the_others_go_on(
    driver: PlanDriver, loaded: tuple[CausalLM, registry.Ops]
) -> None:
    expected = driver_of(*loaded)
    calm = expected.track(PROMPT)
    expected.finish([calm], 6)

    executor, recording = driver._executor, driver._recording
    assert recording is not None
    good, bad = driver.track(PROMPT), driver.track([7, 7, 7])
    driver.step([(good, 100), (bad, 100)])
    forward = recording.forward

    def poisoned(batch: object, kv: KVPool) -> torch.Tensor:
        hidden = forward(batch, kv)
        hidden[1] = torch.nan
        return hidden

    recording.forward = poisoned
    result = driver.step([(good, 1), (bad, 1)])
    recording.forward = forward
    assert result.failed == (bad.seq_id,)
    assert result.samples[1] == ()
    assert len(result.samples[0]) == 1
    driver.drop(bad)
    driver.finish([good], 6)
    assert good.output == calm.output
    assert executor is driver._executor


def test_a_prompt_is_scored_a_few_rows_at_a_time_and_only_up_to_its_end(
    loaded: tuple[CausalLM, registry.Ops],
) -> None:
    driver = driver_of(*loaded)
    recording = driver._recording
    assert recording is not None
    params = SamplingParams(max_new_tokens=9, seed=0, temperature=0.0, prompt_logprobs=1)
    prompt = [(5 * i) % 90 + 3 for i in range(SCORED_ROWS + 9)]
    plain, scored = driver.track(prompt[:4]), driver.track(prompt, params)
    result = driver.step([(plain, 3), (scored, 1000)])
    scores = result.prompt_logprobs[1]
    assert result.prompt_logprobs[0] == ()
    assert [sample.token_id for sample in scores] == prompt[1:]
    assert max(len(logits) for logits in recording.steps) <= SCORED_ROWS
    assert driver.step([(plain, 1), (scored, 1)]).prompt_logprobs in ((), ((), ()))
    again = driver.track(prompt[:SCORED_ROWS], params)
    for first in (0, 20):
        part = driver.step([(again, 20)]).prompt_logprobs[0]
        for found, expected in zip(part, scores[first : first + 20], strict=True):
            assert found.token_id == expected.token_id
            assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_a_plan_without_work_only_keeps_the_books(driver: PlanDriver) -> None:
    track = driver.track(PROMPT)
    driver.step([(track, 4)])
    result = driver._executor.submit(StepPlan(StepId(9), (track.seq_id,), (), (), ())).result()
    assert (result.step_id, result.samples, result.failed) == (9, (), ())
    with pytest.raises(KeyError):
        driver._executor.submit(StepPlan(StepId(10), (track.seq_id,), (), (), ())).result()


def test_a_closed_executor_refuses(driver: PlanDriver) -> None:
    driver._executor.close()
    driver._executor.close()
    with pytest.raises(LawBroken):
        driver._executor.submit(StepPlan(StepId(1), (SeqId(1),), (), (), ())).result()


def test_the_same_seed_gives_the_same_text_and_another_seed_another(driver: PlanDriver) -> None:
    tracks = [
        driver.track(PROMPT, msgspec.structs.replace(RANDOM, seed=seed)) for seed in (5, 5, 6)
    ]
    driver.finish(tracks, 12)
    assert tracks[0].output == tracks[1].output != tracks[2].output
    assert all(len(sample.top) == 3 for sample in tracks[0].samples)
    greedy = driver.track(PROMPT, GREEDY)
    driver.finish([greedy], 1)
    assert greedy.samples[0].logprob is None


def test_a_draw_is_at_the_position_of_the_token_that_it_makes(
    driver: PlanDriver, loaded: tuple[CausalLM, registry.Ops]
) -> None:
    track = driver.track(PROMPT, RANDOM, output_index=2)
    driver.finish([track], 8)
    for index, logits in enumerate(track.logits):
        token = loaded[1].sample(
            logits.unsqueeze(0),
            torch.tensor([1.0]),
            torch.tensor([0], dtype=torch.int32),
            torch.tensor([1.0]),
            torch.tensor([0.0]),
            torch.tensor([RANDOM.seed - 2**64]),
            torch.tensor([2], dtype=torch.int32),
            torch.tensor([len(PROMPT) + index], dtype=torch.int32),
        )
        assert track.output[index] == int(token)


def test_copy_moves_whole_pages_and_nothing_else(loaded: tuple[CausalLM, registry.Ops]) -> None:
    model, ops = loaded
    spec = KVSpec(model.config.num_layers, 2, 16, PAGE, "float32")
    pool = KVPool(spec, 6, CPU)
    pool.pages.random_(256)
    before = pool.pages.clone()
    driver = PlanDriver(LocalExecutor(model, pool, ops), page_size=PAGE, num_pages=6)
    driver.copy(2, 5)  # type: ignore[arg-type]
    driver.copy(3, 1)  # type: ignore[arg-type]
    driver.step([])
    before[5], before[1] = before[2].clone(), before[3].clone()
    assert torch.equal(pool.pages, before)
    assert pool.num_bytes == 7 * spec.page_bytes


def test_the_thread_that_runs_a_step_uses_the_device_of_the_pool(
    loaded: tuple[CausalLM, registry.Ops], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ops = loaded
    used: list[tuple[int, torch.device]] = []

    def use(device: torch.device) -> None:
        used.append((threading.get_ident(), device))

    monkeypatch.setattr(local_executor, "use_device", use)
    pool = KVPool(KVSpec(model.config.num_layers, 2, 16, PAGE, "float32"), 6, CPU)
    executor = LocalExecutor(model, pool, ops, async_scheduling=True)
    executor.submit(StepPlan(StepId(1), (), (), (), ())).result()
    executor.close()
    ((thread, device),) = used
    assert (thread != threading.get_ident(), device) == (True, CPU)


def test_a_gpu_is_set_for_the_thread_and_a_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    transfer.use_device(CPU)
    transfer.use_device(torch.device("cuda", 1))
    assert chosen == [torch.device("cuda", 1)]


def test_untouched_pages_cost_no_memory() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    spec = KVSpec(4, 2, 64, 16, "bfloat16")
    before = resident_bytes()
    pool = KVPool(spec, 40_000, CPU)
    assert pool.num_bytes > 1e9
    pool.pages[1] = 1
    assert resident_bytes() - before < 50e6
    assert int(pool.pages[1].long().sum()) == pool.pages[1].numel()
