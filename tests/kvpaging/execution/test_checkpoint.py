"""Directories, hub ids in the cache, and what is neither; no test leaves this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpaging.base.errors import ConfigError
from kvpaging.execution.checkpoint import resolve_checkpoint

SCRIPT = """
import sys
from kvpaging.base.errors import ConfigError
from kvpaging.execution.checkpoint import resolve_checkpoint
try:
    print(resolve_checkpoint(sys.argv[1]))
except ConfigError as error:
    print("refused:", error)
print("torch" in sys.modules)
"""


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("name", ["/no/such/dir", "./nothing", "a/b/c", "what is this"])
def test_what_can_be_no_hub_id_is_not_looked_up(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no directory"):
        resolve_checkpoint(name)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="is empty"):
        resolve_checkpoint("")


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        resolve_checkpoint(str(path))


def resolve_in_process(name: str, hub: Path, **environment: str) -> list[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, name],
        env={**os.environ, "HF_HOME": str(hub), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    ).stdout.splitlines()


def cached(hub: Path) -> Path:
    """A repository as the hub's cache lays it out."""
    repository = hub / "hub" / "models--org--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    return snapshot


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_a_cached_repository_needs_no_network(tmp_path: Path, environment: dict[str, str]) -> None:
    snapshot = cached(tmp_path)
    assert resolve_in_process("org/tiny", tmp_path, **environment) == [str(snapshot), "False"]


def test_neither_cached_nor_reachable_says_both(tmp_path: Path) -> None:
    (line, _) = resolve_in_process("org/tiny", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert line.startswith("refused:")
    assert "org/tiny" in line
    assert "cache" in line
