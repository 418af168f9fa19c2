"""The command line as users type it; what serves is in `test_launch.py`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.metadata import version

import pytest

from server.cli import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.strip() == version("kvpaging")


def test_help_names_the_commands_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert all(command in usage for command in ("serve", "config", "doctor", "version"))
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--kv-cache-memory" in out
    assert "KVPAGING_KV_CACHE_MEMORY" in out


def test_config_prints_values_and_origins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPAGING_PORT", "9000")
    assert main(["config", "--page-size", "4", "--no-prefix-cache"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["page_size"] == ["4", "--page-size"]
    assert lines["port"] == ["9000", "KVPAGING_PORT"]
    assert lines["prefix_cache"] == ["False", "--prefix-cache"]
    assert lines["host"] == ["127.0.0.1", "default"]


def test_an_unknown_flag_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--pagesize", "4"])
    assert caught.value.code == 2
    assert "--pagesize is not a flag; did you mean --page-size?" in capsys.readouterr().err


def test_flags_are_never_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--max-num", "4"])
    assert caught.value.code == 2
    assert "--max-num is not a flag" in capsys.readouterr().err


def test_an_unknown_command_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sevre"]) == 2
    assert "'sevre' is not a command; did you mean serve?" in capsys.readouterr().err


def test_a_port_in_use_ends_at_once_with_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-P", "-m", "server", "serve", "--port", str(port)]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=_environment()
        )
    assert ended.returncode == 2
    assert f"can't listen on 127.0.0.1:{port}" in ended.stderr
    assert "--port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_host_that_is_none_ends_with_2() -> None:
    command = [sys.executable, "-P", "-m", "server", "serve", "--host", "no.such.host.invalid"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=_environment()
    )
    assert ended.returncode == 2
    assert "--host" in ended.stderr


def test_doctor_says_what_computes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "CPU", "memory", "compiler", "GPU", "kernels", "exact"):
        assert word in out


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("KVPAGING_")}
