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

COUNT, WAIT = 1, 5
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
        return httpx.Client(base_url=self.url, timeout=20)

    def ended(self, timeout_s: float = 20) -> int:
        code = self.popen.wait(timeout_s)
        self._reader.join(5)
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


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones() -> None:
    with served(ON_COMMAND) as server:
        server.until_ready()
        with (
            server.client() as client,
            client.stream("POST", "/generate", json=order(COUNT, 400)) as answer,
        ):
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.popen.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            refused = httpx.post(server.url + "/generate", json=order(COUNT, 1), timeout=5)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(server.url + "/live", timeout=5).status_code == 200
            assert httpx.get(server.url + "/ready", timeout=5).status_code == 503
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
    with served(ON_COMMAND) as server:
        server.until_ready()
        with (
            server.client() as client,
            client.stream("POST", "/generate", json=order(COUNT, 90_000)) as answer,
        ):
            lines = answer.iter_lines()  # held: without it the answer is closed
            next(lines)
            server.popen.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.popen.poll() is None
            begin = time.monotonic()
            server.popen.send_signal(signal.SIGTERM)
            assert server.ended() == 128 + signal.SIGTERM
            assert time.monotonic() - begin < 3


def test_a_signal_while_the_engine_loads_ends_it_well() -> None:
    with served(ON_COMMAND, "--model", "slowly", "--log-format", "json") as server:
        time.sleep(1)
        server.popen.send_signal(signal.SIGTERM)
        assert server.ended(5) == 0
    for line in server.errors:
        assert json.loads(line)["message"]


def test_live_answers_while_the_engine_loads(unused_port: int) -> None:
    with served(ON_COMMAND, "--model", "slowly", "--port", str(unused_port)):
        url = f"http://127.0.0.1:{unused_port}"
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.get(url + "/live", timeout=10).status_code == 200
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        health = httpx.get(url + "/health", timeout=5)
        assert health.status_code == 503
        assert "loading" in health.text


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


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
        assert server.ended(60) == 2
    (complaint,) = [line for line in server.errors if line.startswith("kvpaging: ")]
    assert str(path) in complaint
    assert "Traceback" not in "".join(server.errors)


def test_a_crash_loop_ends_the_server_with_1() -> None:
    with served(ON_COMMAND) as server:
        server.until_ready()
        for crash in range(3):
            deadline = time.monotonic() + 10
            while httpx.get(server.url + "/ready", timeout=5).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            failed = httpx.post(
                server.url + "/generate",
                json={"prompt": [2, crash], "max_new_tokens": 1},
                timeout=10,
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
        deadline = time.monotonic() + 10
        while httpx.get(server.url + "/health", timeout=5).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        again = httpx.post(server.url + "/generate", json=order(COUNT, 2, False), timeout=10)
        assert again.json()["outputs"][0]["token_ids"] == [0, 1]
        server.popen.terminate()
        assert server.ended() == 0


def test_the_engine_never_outlives_the_api() -> None:
    with served(ON_COMMAND) as server:
        server.until_ready()
        api, engine = server.processes()
        os.kill(api, signal.SIGKILL)
        deadline = time.monotonic() + 2
        while is_running(engine):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_engine_that_loads_does_not_outlive_the_api_either() -> None:
    with served(ON_COMMAND, "--model", "hang") as server:
        deadline = time.monotonic() + 10
        while len(server.processes()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        api, engine = server.processes()
        os.kill(api, signal.SIGKILL)
        deadline = time.monotonic() + 2
        while is_running(engine):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_few_file_descriptors_bound_the_connections() -> None:
    limited = ("bash", "-c", 'ulimit -n 100; exec "$@"', "-", *ON_COMMAND)
    with served(limited) as server, contextlib.ExitStack() as held:
        server.until_ready()
        host, port = server.url.removeprefix("http://").split(":")
        for _ in range(60):  # more than fit, and none of them is left to the backlog
            held.enter_context(socket.create_connection((host, int(port)), timeout=5))
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url + "/live", timeout=5).raise_for_status()
        held.close()
        time.sleep(0.3)
        assert httpx.get(server.url + "/live", timeout=5).status_code == 200
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


def test_sigterm_before_anything_is_loaded_ends_it_well() -> None:
    program = """
import os, signal, sys
from server import cli
cli._resolved = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["kvpaging", "serve"]
cli.main()
"""
    assert (
        subprocess.run([sys.executable, "-P", "-c", program], timeout=20, check=False).returncode
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
        assert httpx.get(server.url + "/v1/models", timeout=5).status_code == 401
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
    before = [cpu_seconds(pid) for pid in pids]
    time.sleep(3)
    used = [cpu_seconds(pid) - begin for pid, begin in zip(pids, before, strict=True)]
    assert sum(used) / 3 <= 0.01 + 2 / TICK / 3, used  # the kernel counts in ticks
