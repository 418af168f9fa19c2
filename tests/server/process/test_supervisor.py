"""The supervisor against real engine processes, with the engine of `engine_on_command.py`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from itertools import count
from pathlib import Path

import pytest

from kvpaging.base.config import EngineOptions
from kvpaging.base.errors import BadRequest, ConfigError, EngineDied, Overloaded, PromptTooLong
from kvpaging.base.ids import RequestId
from kvpaging.engine.messages import Loading
from kvpaging.scheduling.outputs import FinishReason, SequenceOutput
from kvpaging.scheduling.request import Request, SamplingParams
from server.client import EngineState, ShuttingDown
from server.engine_process import EngineProcess
from server.supervisor import EngineSupervisor, SupervisorLimits

COMMAND = (sys.executable, str(Path(__file__).with_name("engine_on_command.py")))
COUNT, RAISE, HANG, KILL, WAIT, FLOOD, REJECT = range(1, 8)
_ids = count()

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def request(do: int, *rest: int, max_new_tokens: int = 3, n: int = 1, seed: int = 0) -> Request:
    sampling = SamplingParams(max_new_tokens, seed)
    return Request(RequestId(f"r{next(_ids)}"), (do, *rest), sampling, n)


@asynccontextmanager
async def supervisor(
    start: str = "well",
    limits: SupervisorLimits | None = None,
    on_loading: Callable[[Loading], None] | None = None,
    max_num_waiting: int = 1024,
) -> AsyncIterator[EngineSupervisor]:
    options = EngineOptions(start, max_num_waiting=max_num_waiting)
    client = EngineSupervisor(
        lambda: EngineProcess.spawn(options, command=COMMAND), limits=limits, on_loading=on_loading
    )
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def outputs_of(client: EngineSupervisor, order: Request) -> list[SequenceOutput]:
    async with aclosing(client.submit(order)) as outputs:
        return [output async for output in outputs]


async def tokens_of(client: EngineSupervisor, order: Request) -> list[int]:
    return [s.token_id for output in await outputs_of(client, order) for s in output.samples]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def is_ready(client: EngineSupervisor) -> None:
    await until(lambda: client.status().state is EngineState.READY)


def engine_pid(client: EngineSupervisor) -> int:
    assert client._process is not None
    return client._process.popen.pid


def is_running(pid: int) -> bool:
    """False for a zombie too: it computes nothing and holds nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_outputs_of_many_requests_reach_their_readers() -> None:
    async with supervisor() as client:
        assert client.status().state is EngineState.LOADING
        config = await client.ready()
        assert (config.architecture, client.status().config) == ("FakeModel", config)
        answers = await asyncio.gather(
            *(tokens_of(client, request(COUNT, max_new_tokens=k)) for k in range(1, 9))
        )
        assert answers == [list(range(k)) for k in range(1, 9)]
        assert client.num_open_requests == 0
        assert client.status().stats.step_id > 0


async def test_all_outputs_of_one_request_end() -> None:
    async with supervisor() as client:
        await client.ready()
        outputs = await outputs_of(client, request(COUNT, n=3))
        ends = {o.output_index: o.finished.reason for o in outputs if o.finished}
        assert ends == dict.fromkeys(range(3), FinishReason.LENGTH)


async def test_finish_ends_one_output() -> None:
    async with supervisor() as client:
        await client.ready()
        order = request(COUNT, max_new_tokens=50_000)
        reasons = []
        async for output in client.submit(order):
            if output.samples and output.samples[0].token_id == 2:
                client.finish(order.request_id, 0, 2)
            if output.finished:
                reasons.append(output.finished.reason)
        assert reasons == [FinishReason.STOP]


async def test_closing_the_iterator_aborts_the_request() -> None:
    async with supervisor() as client:
        await client.ready()
        async with aclosing(client.submit(request(COUNT, max_new_tokens=50_000))) as outputs:
            await anext(outputs)
        assert client.num_open_requests == 0
        await until(lambda: client.status().stats.num_evicted_pages == 1)
        await until(lambda: client.status().stats.num_running == 0)


async def test_a_cancelled_reader_aborts_the_request() -> None:
    async with supervisor() as client:
        await client.ready()
        reader = asyncio.create_task(tokens_of(client, request(WAIT)))
        await until(lambda: client.num_open_requests == 1)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await until(lambda: client.status().stats.num_running == 0)


async def test_an_iterator_that_was_never_begun_sent_nothing() -> None:
    async with supervisor() as client:
        await client.ready()
        await client.submit(request(WAIT)).aclose()
        assert client.num_open_requests == 0


async def test_a_slow_reader_loses_its_request_and_delays_nobody() -> None:
    async with supervisor(limits=SupervisorLimits(max_pending_outputs=10)) as client:
        await client.ready()
        slow = client.submit(request(FLOOD, max_new_tokens=1000))
        await anext(slow)
        assert await tokens_of(client, request(COUNT)) == [0, 1, 2]
        with pytest.raises(EngineDied, match="10 outputs behind"):
            async for _ in slow:
                pass
        await until(lambda: client.status().stats.num_running == 0)


async def test_refusals_at_the_door_and_by_the_engine() -> None:
    async with supervisor() as client:
        with pytest.raises(EngineDied, match="loading"):
            await outputs_of(client, request(COUNT))
        await client.ready()
        with pytest.raises(BadRequest, match="token id 100 in the prompt"):
            await outputs_of(client, request(COUNT, 100))
        with pytest.raises(PromptTooLong):
            await outputs_of(client, request(COUNT, max_new_tokens=100_000))
        with pytest.raises(Overloaded, match="too much to do") as caught:
            await outputs_of(client, request(REJECT))
        assert 1 <= caught.value.retry_after_s <= 60


async def test_a_full_queue_is_refused_at_the_door() -> None:
    async with supervisor(max_num_waiting=2) as client:
        await client.ready()
        # All at once, before any step: four may run, two may wait.
        readers = [asyncio.create_task(tokens_of(client, request(COUNT))) for _ in range(8)]
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert [type(r) for r in results] == [list] * 6 + [Overloaded] * 2


async def test_pages() -> None:
    async with supervisor() as client:
        with pytest.raises(EngineDied):
            await client.pages()
        await client.ready()
        first, second = await asyncio.gather(client.pages(), client.pages())
        assert [page.page_id for page in first.pages] == [1, 2, 3]
        assert first.query_id != second.query_id


@pytest.mark.parametrize(("do", "how"), [(KILL, "SIGKILL"), (RAISE, "exit code 1")])
async def test_a_crash_fails_open_requests_and_the_engine_comes_back(do: int, how: str) -> None:
    async with supervisor() as client:
        await client.ready()
        bystander = asyncio.create_task(tokens_of(client, request(WAIT)))
        await until(lambda: client.num_open_requests == 1)
        with pytest.raises(EngineDied, match="ended under this request"):
            await outputs_of(client, request(do))
        with pytest.raises(EngineDied, match="ended under this request"):
            await bystander
        assert client.status().state is not EngineState.READY
        with pytest.raises(EngineDied):
            await client.pages()
        await is_ready(client)
        assert client.status().num_restarts == 1
        assert await tokens_of(client, request(COUNT)) == [0, 1, 2]


async def test_kill_9_from_outside() -> None:
    async with supervisor() as client:
        await client.ready()
        picture = asyncio.create_task(tokens_of(client, request(WAIT)))
        await until(lambda: client.status().stats.num_running == 1)
        os.kill(engine_pid(client), signal.SIGKILL)
        with pytest.raises(EngineDied):
            await picture
        await is_ready(client)


async def test_a_request_open_at_two_crashes_is_refused_and_bystanders_are_not() -> None:
    async with supervisor() as client:
        await client.ready()
        for crash in range(2):
            bystander = asyncio.create_task(tokens_of(client, request(WAIT, crash)))
            await until(lambda: client.num_open_requests == 1)
            with pytest.raises(EngineDied):
                await outputs_of(client, request(KILL, 8, 9, seed=crash))
            with pytest.raises(EngineDied):
                await bystander
            await is_ready(client)
        with pytest.raises(BadRequest, match="crashed twice") as caught:
            await outputs_of(client, request(KILL, 8, 9, seed=2))
        assert caught.value.code == "crashed_engine"
        assert client.status().num_restarts == 2
        assert await tokens_of(client, request(COUNT)) == [0, 1, 2]


async def test_whoever_completes_is_no_suspect_any_more() -> None:
    async with supervisor() as client:
        await client.ready()
        for _ in range(2):
            innocent = client.submit(request(COUNT, max_new_tokens=1000))
            await anext(innocent)
            os.kill(engine_pid(client), signal.SIGSTOP)  # or it might complete first
            os.kill(engine_pid(client), signal.SIGKILL)
            with pytest.raises(EngineDied):
                async for _ in innocent:
                    pass
            await is_ready(client)
            assert len(await tokens_of(client, request(COUNT, max_new_tokens=1000))) == 1000


async def test_a_crash_loop_ends_dead_and_says_why() -> None:
    async with supervisor(limits=SupervisorLimits(max_crashes=2)) as client:
        await client.ready()
        for prompt in range(2):
            await is_ready(client)
            with pytest.raises(EngineDied):
                await outputs_of(client, request(RAISE, prompt))
        assert client.given_up is not None
        error = await asyncio.wait_for(client.given_up, 60)
        assert isinstance(error, EngineDied)
        assert "crashed 2 times" in str(error)
        assert client.status().state is EngineState.DEAD
        assert client.status().detail == str(error)
        with pytest.raises(EngineDied, match="dead"):
            await outputs_of(client, request(COUNT))


async def test_crashes_far_apart_are_no_loop() -> None:
    async with supervisor(limits=SupervisorLimits(max_crashes=2, steady_s=0.0)) as client:
        await client.ready()
        for prompt in range(3):
            with pytest.raises(EngineDied):
                await outputs_of(client, request(RAISE, prompt))
            await is_ready(client)
        assert client.status().num_restarts == 3


async def test_an_engine_that_refuses_its_options_is_not_started_again() -> None:
    async with supervisor("refuse") as client:
        with pytest.raises(ConfigError, match="no such checkpoint"):
            await asyncio.wait_for(client.ready(), 60)
        assert client.status().state is EngineState.DEAD
        assert client.status().num_restarts == 0


@pytest.mark.parametrize(
    ("start", "how"),
    [("raise", "exit code 1"), ("killed", "SIGKILL"), ("garbage", "over the limit")],
)
async def test_an_engine_that_never_was_ready_is_not_started_again(start: str, how: str) -> None:
    async with supervisor(start) as client:
        with pytest.raises(EngineDied, match=how):
            await asyncio.wait_for(client.ready(), 60)
        assert client.status().num_restarts == 0


async def test_progress_is_reported_and_closing_does_not_wait_for_the_load() -> None:
    seen: list[Loading] = []
    async with supervisor("slowly", on_loading=seen.append) as client:
        await until(lambda: len(seen) >= 3)
        assert client.status().state is EngineState.LOADING
        assert client.status().detail.startswith("loading weights, ")
        begin = time.monotonic()
        await client.close()
        assert time.monotonic() - begin < 30  # the load would take a minute


async def test_no_step_with_a_request_open_is_a_stall() -> None:
    async with supervisor(limits=SupervisorLimits(stall_s=1.0, close_s=0.2)) as client:
        await client.ready()
        await asyncio.sleep(1.2)
        assert client.status().state is EngineState.READY  # idle is no stall
        stuck = asyncio.create_task(tokens_of(client, request(HANG)))
        await until(lambda: client.num_open_requests == 1)
        assert client.status().state is EngineState.READY  # and idling before does not count
        await until(lambda: client.status().state is EngineState.STALLED)
        assert "1 requests open" in client.status().detail
        await client.close()  # and a hung engine is killed
        with pytest.raises(ShuttingDown):
            await stuck


async def test_a_hung_engine_is_replaced() -> None:
    limits = SupervisorLimits(hang_s=1.0)
    async with supervisor(limits=limits) as client:
        await client.ready()
        assert await tokens_of(client, request(COUNT)) == [0, 1, 2]
        await asyncio.sleep(1.2)
        assert client.status().num_restarts == 0  # idle is no hang
        stuck = asyncio.create_task(tokens_of(client, request(WAIT)))
        await until(lambda: client.status().stats.num_running == 1)
        os.kill(engine_pid(client), signal.SIGSTOP)
        with pytest.raises(EngineDied, match="ended under this request"):
            await asyncio.wait_for(stuck, 60)
        await is_ready(client)
        assert client.status().num_restarts == 1
        assert await tokens_of(client, request(COUNT)) == [0, 1, 2]


async def test_slow_steps_that_end_are_no_hang() -> None:
    async with supervisor(limits=SupervisorLimits(hang_s=1.0)) as client:
        await client.ready()
        # Each takes a millisecond at least: longer together than an engine may hang.
        assert len(await tokens_of(client, request(COUNT, max_new_tokens=1500))) == 1500
        assert client.status().num_restarts == 0


async def test_pages_of_an_engine_that_does_not_answer() -> None:
    async with supervisor(limits=SupervisorLimits(query_s=0.2, close_s=0.2)) as client:
        await client.ready()
        os.kill(engine_pid(client), signal.SIGSTOP)
        with pytest.raises(EngineDied, match=r"did not answer within 0\.2 s"):
            await client.pages()


async def test_close_ends_the_process_and_is_idempotent() -> None:
    async with supervisor() as client:
        await client.ready()
        pid = engine_pid(client)
        await client.close()
        assert not is_running(pid)
        await client.close()
        with pytest.raises(EngineDied, match="shutting down"):
            await outputs_of(client, request(COUNT))


async def test_signals_to_the_whole_group_leave_the_engine_running() -> None:
    async with supervisor() as client:
        await client.ready()
        os.kill(engine_pid(client), signal.SIGINT)
        os.kill(engine_pid(client), signal.SIGTERM)
        assert await tokens_of(client, request(COUNT)) == [0, 1, 2]
        assert client.status().num_restarts == 0


async def test_the_engine_searches_for_modules_where_this_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    command = (sys.executable, "-P", "-c", "import only_here, sys; sys.exit(7)")
    process = EngineProcess.spawn(EngineOptions("m"), command=command)
    with process.sock:
        assert await process.reap(60) == 7
