"""The whole server as a process: start-up lines, signals, idleness, and whom the engine outlives.

Most of them run with an engine that obeys its prompts (`engine_on_command.py`); the last ones are
the real thing, on the demo model.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from http_app import wait_for

from kvpaging.execution import page_mover
from kvpaging.levels import disk
from server import launch
from server.supervisor import SupervisorLimits

COUNT, HOLD = 1, 8
ON_COMMAND = (sys.executable, str(Path(__file__).with_name("serve_on_command.py")))
REAL = (sys.executable, "-P", "-m", "server", "serve")
TICK = os.sysconf("SC_CLK_TCK")


class Served:
    """A server process: what it printed, and where it listens."""

    def __init__(self, command: tuple[str, ...], *flags: str, cwd: Path | None = None):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KVPAGING_")}
        self.begun = time.monotonic()
        self.popen = subprocess.Popen(
            [*command, "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=cwd,
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def _read_errors(self) -> None:
        assert self.popen.stderr is not None
        self.errors.extend(self.popen.stderr)

    def until_ready(self) -> str:
        """The lines up to the address and the example."""
        assert self.popen.stdout is not None
        lines = ""
        while "  try " not in lines:
            line = self.popen.stdout.readline()
            assert line, f"ended before it was ready: {self.errors}"
            lines += line
        found = re.search(r"address +(http://\S+)", lines)
        assert found is not None
        self.url = found[1]
        return lines

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def ended(self) -> int:
        code = self.popen.wait(120)
        self._reader.join(60)
        return code

    def processes(self) -> list[int]:
        """The API's process id, and its engine's."""
        path = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children")
        return [self.popen.pid, *map(int, path.read_text().split())]


@contextlib.contextmanager
def served(command: tuple[str, ...], *flags: str, cwd: Path | None = None) -> Iterator[Served]:
    server = Served(command, *flags, cwd=cwd)
    try:
        yield server
    finally:
        server.popen.kill()
        server.popen.wait()


def order(do: int, max_new_tokens: int, stream: bool = True) -> dict[str, object]:
    return {
        "prompt": [do],
        "max_new_tokens": max_new_tokens,
        "stream": stream,
        "ignore_eos": True,
    }


def is_running(pid: int) -> bool:
    """False for a zombie too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_draining(server: Served) -> None:
    """Until it has taken the signal that was sent."""
    wait_for(lambda: httpx.get(server.url + "/ready", timeout=60).status_code == 503)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    with served(ON_COMMAND, "--grace-period-s", "200", cwd=tmp_path) as server:
        server.until_ready()
        with (
            server.client() as client,
            client.stream("POST", "/generate", json=order(HOLD, 40)) as answer,
        ):
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.popen.send_signal(signal.SIGTERM)
            wait_until_draining(server)
            refused = httpx.post(server.url + "/generate", json=order(COUNT, 1), timeout=60)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(server.url + "/live", timeout=60).status_code == 200
            (tmp_path / "go").touch()
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert server.ended() == 0


def test_what_outlasts_the_grace_period_ends_with_an_error_event() -> None:
    with served(ON_COMMAND, "--grace-period-s", "0.3") as server:
        server.until_ready()
        with (
            server.client() as client,
            client.stream("POST", "/generate", json=order(COUNT, 90_000)) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            server.popen.send_signal(signal.SIGINT)
            events = [line for line in lines if line]
        assert events[-2] == "event: error"
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert "shutting down" in error["message"]
        assert error["code"] == "draining"
        assert server.ended() == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with served(ON_COMMAND, "--grace-period-s", "1000") as server:
        server.until_ready()
        with (
            server.client() as client,
            client.stream("POST", "/generate", json=order(COUNT, 90_000)) as answer,
        ):
            lines = answer.iter_lines()  # held: without it the answer is closed
            next(lines)
            server.popen.send_signal(signal.SIGTERM)
            wait_until_draining(server)
            assert server.popen.poll() is None
            server.popen.send_signal(signal.SIGTERM)
            assert server.ended() == 128 + signal.SIGTERM


def test_a_signal_while_the_engine_loads_ends_it_well() -> None:
    with served(ON_COMMAND, "--model", "slowly", "--log-format", "json") as server:
        wait_for(lambda: server.errors)  # how far the load is
        begin = time.monotonic()
        server.popen.send_signal(signal.SIGTERM)
        assert server.ended() == 0
        assert time.monotonic() - begin < 30, "it waited for the load, which takes a minute"
    for line in server.errors:
        assert json.loads(line)["message"]


def test_live_answers_while_the_engine_loads() -> None:
    with served(ON_COMMAND, "--model", "slowly") as server:
        wait_for(lambda: listening_port(server.popen.pid))
        url = f"http://127.0.0.1:{listening_port(server.popen.pid)}"
        assert httpx.get(url + "/live", timeout=60).status_code == 200
        wait_for(lambda: "loading" in httpx.get(url + "/health", timeout=60).text)
        assert httpx.get(url + "/health", timeout=60).status_code == 503


def listening_port(pid: int) -> int | None:
    """Where a process listens that has not said so yet; `None` before it does."""
    files = [path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, address, _, state, *_, inode = line.split()[:10]
        if state == "0A" and Path(f"socket:[{inode}]") in files:
            return int(address.split(":")[1], 16)
    return None


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("refuse", "refused: no such checkpoint"),
        ("raise", "ended before it was ready: exit code 1"),
        ("killed", "killed by SIGKILL"),
    ],
)
def test_a_start_that_fails_says_why_and_ends(model: str, complaint: str) -> None:
    with served(ON_COMMAND, "--model", model) as server:
        assert server.ended() == 1
    assert complaint in "".join(server.errors)


@pytest.mark.parametrize("model", ["an empty directory", "no directory"])
def test_a_model_that_can_not_be_used_ends_with_2(model: str, tmp_path: Path) -> None:
    path = tmp_path if model == "an empty directory" else tmp_path / "nothing"
    with served(REAL, "--model", str(path)) as server:
        assert server.ended() == 2
    (complaint,) = [line for line in server.errors if line.startswith("kvpaging: ")]
    assert str(path) in complaint
    assert "Traceback" not in "".join(server.errors)


def test_a_crash_loop_ends_the_server_with_1() -> None:
    with served(ON_COMMAND) as server:
        server.until_ready()
        for crash in range(3):
            wait_for(lambda: httpx.get(server.url + "/ready", timeout=60).status_code == 200)
            failed = httpx.post(
                server.url + "/generate",
                json={"prompt": [2, crash], "max_new_tokens": 1},
                timeout=60,
            )
            assert failed.status_code == 503
        assert server.ended() == 1
    assert "crashed 3 times" in "".join(server.errors)


def test_a_stream_under_kill_9_of_the_engine_ends_in_an_error_and_the_server_recovers() -> None:
    with served(ON_COMMAND) as server:
        server.until_ready()
        with (
            server.client() as client,
            client.stream("POST", "/generate", json=order(COUNT, 90_000)) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            os.kill(server.processes()[1], signal.SIGKILL)
            events = [line for line in lines if line]
        assert events[-2] == "event: error"
        assert "data: [DONE]" not in events
        wait_for(lambda: httpx.get(server.url + "/health", timeout=60).status_code == 200)
        again = httpx.post(server.url + "/generate", json=order(COUNT, 2, False), timeout=60)
        assert again.json()["outputs"][0]["token_ids"] == [0, 1]
        server.popen.terminate()
        assert server.ended() == 0


def test_the_engine_never_outlives_the_api() -> None:
    with served(ON_COMMAND) as server:
        server.until_ready()
        api, engine = server.processes()
        os.kill(api, signal.SIGKILL)
        wait_for(lambda: not is_running(engine))


def test_an_engine_that_loads_does_not_outlive_the_api_either() -> None:
    with served(ON_COMMAND, "--model", "hang") as server:
        wait_for(lambda: len(server.processes()) == 2)
        time.sleep(0.5)  # most often it hangs by then; it must end in either case
        api, engine = server.processes()
        os.kill(api, signal.SIGKILL)
        wait_for(lambda: not is_running(engine))


def is_live(server: Served) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(server.url + "/live", timeout=60).status_code == 200
    return False


def test_few_file_descriptors_bound_the_connections() -> None:
    limited = ("bash", "-c", 'ulimit -n 100; exec "$@"', "-", *ON_COMMAND)
    with served(limited) as server, contextlib.ExitStack() as held:
        server.until_ready()
        host, port = server.url.removeprefix("http://").split(":")
        for _ in range(60):  # more than fit, and none of them is left to the backlog
            held.enter_context(socket.create_connection((host, int(port)), timeout=60))
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url + "/live", timeout=60).raise_for_status()
        held.close()
        wait_for(lambda: is_live(server))
        server.popen.terminate()
        assert server.ended() == 0
    assert "36 connections may be open at once" in "".join(server.errors)
    assert len("".join(server.errors)) < 10_000


def test_a_lower_soft_limit_of_file_descriptors_is_raised() -> None:
    limited = ("bash", "-c", 'ulimit -Sn 80; exec "$@"', "-", *ON_COMMAND)
    with served(limited, "--max-connections", "200") as server:
        server.until_ready()
        limits = Path(f"/proc/{server.popen.pid}/limits").read_text()
        assert re.search(r"Max open files +264 ", limits)
        server.popen.terminate()
        assert server.ended() == 0


def test_the_orderly_end_is_over_before_docker_kills() -> None:
    mover_s = page_mover.CLOSE_S + page_mover.WAYS_CLOSE_S + disk._PATIENCE_S
    close_s = SupervisorLimits().close_s
    assert mover_s + 1.0 <= close_s, "a step, and what else ending takes"
    assert close_s + launch.CLOSING_S < 9.0


def test_sigterm_before_anything_is_loaded_ends_it_well() -> None:
    program = """
import os, signal, sys
from server import cli
cli._resolved = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["kvpaging", "serve"]
cli.main()
"""
    assert (
        subprocess.run([sys.executable, "-P", "-c", program], timeout=120, check=False).returncode
        == 0
    )


def test_listening_beyond_loopback_without_a_key_is_warned_of() -> None:
    with served(ON_COMMAND, "--host", "0.0.0.0") as server:
        lines = server.until_ready()
        assert "curl http://127.0.0.1:" in lines
        server.popen.terminate()
        assert server.ended() == 0
        assert "without an API key" in "".join(server.errors)
    with served(ON_COMMAND, "--host", "0.0.0.0", "--api-key", "k") as server:
        assert "Bearer YOUR_KEY" in server.until_ready()
        assert httpx.get(server.url + "/v1/models", timeout=60).status_code == 401
        server.popen.terminate()
        assert server.ended() == 0
        assert "without an API key" not in "".join(server.errors)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str]]:
    """In a directory whose modules neither process may import."""
    decoys = tmp_path_factory.mktemp("decoys")
    for name in ("kvpaging", "kernels", "torch", "json"):
        (decoys / f"{name}.py").write_text("raise SystemExit('a decoy was imported')")
    with served(REAL, cwd=decoys) as server:
        yield server, server.until_ready()
        server.popen.terminate()
        assert server.ended() == 0


def test_the_demo_model_says_what_runs_where(demo: tuple[Served, str]) -> None:
    _, lines = demo
    for word in ("model", "device", "kernels", "KV pages", "tokens in", "decided", "address"):
        assert word in lines


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_line_works_when_pasted(demo: tuple[Served, str]) -> None:
    _, lines = demo
    command = lines.split("  try ", 1)[1].strip()
    answer = subprocess.run(
        ["bash", "-c", command.replace("curl", "curl -sS", 1)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (output,) = json.loads(answer.stdout)["outputs"]
    assert len(output["token_ids"]) == 48 or output["finish_reason"] == "stop"


def test_idle_costs_under_one_percent_of_a_core(demo: tuple[Served, str]) -> None:
    server, _ = demo
    with server.client() as client:
        client.post("/generate", json={"prompt": "import os", "max_new_tokens": 2})
    time.sleep(1)  # what is left of the request's work, an audit included
    pids = server.processes()
    assert len(pids) == 2
    measured: list[list[float]] = []
    # What a request left may take longer on a slow machine; what is used all the time is seen in
    # each of these. The kernel counts in ticks.
    while len(measured) < 10 and not (measured and sum(measured[-1]) <= 0.03 + 2 / TICK):
        before = [cpu_seconds(pid) for pid in pids]
        time.sleep(3)
        measured.append([cpu_seconds(pid) - begin for pid, begin in zip(pids, before, strict=True)])
    assert sum(measured[-1]) <= 0.03 + 2 / TICK, measured
