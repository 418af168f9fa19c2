"""`kvpaging replay` as people and programs call it."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from kvpaging.base.errors import ConfigError
from kvpaging.cache.eviction.names import POLICIES
from kvpaging.replay.synthetic import conversations, write_mooncake
from server import cli, replay
from server.settings import FlagParser, resolve


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trace") / "small.jsonl"
    write_mooncake(conversations(120, seed=3), path)
    return str(path)


def test_json_is_one_object_a_run(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--policy", "lru", "--policy", "arc", "--capacity", "100", "--capacity", "unlimited"]
    assert cli.main(["replay", trace, *flags, "--json"]) == 0
    runs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(run["policy"], run["capacity_pages"]) for run in runs] == [
        ("lru", 100),
        ("lru", None),
        ("arc", 100),
        ("arc", None),
    ]
    for run in runs:
        assert 0 < run["hit_ratio_pages"] < 1
        assert 0 < run["hit_ratio_tokens"] < 1
        assert run["seconds"] > 0
        assert run["page_size"] == 512


def test_the_table_csv_and_plots(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'kvpaging[plot]'")
    for suffix in ("svg", "png"):
        flags = [
            "--policy",
            "all",
            "--csv",
            f"{tmp_path}/out.csv",
            "--plot",
            f"{tmp_path}/p.{suffix}",
        ]
        assert cli.main(["replay", trace, *flags]) == 0
    assert "<svg" in (tmp_path / "p.svg").read_text()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["policy", "capacity"]
    assert len(lines) == 2 * (1 + 7 * 5)
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 * 5
    assert {row["policy"] for row in rows} == {line.split()[0] for line in lines[1:36]}


def test_the_csv_has_what_the_json_has(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--mode", "full", "--capacity", "2_000", "--levels", "host=900,disk=3000"]
    assert cli.main(["replay", trace, *flags, "--json", "--csv", f"{tmp_path}/out.csv"]) == 0
    run = json.loads(capsys.readouterr().out)
    with (tmp_path / "out.csv").open() as file:
        [row] = csv.DictReader(file)
    for name, num in run["num_level_hit_pages"].items():
        assert row[f"num_{name}_hit_pages"] == str(num)
    assert {name: float(row[name]) for name in run["latencies"]} == run["latencies"]
    assert len(row) == len(run) - 2 + 2 + 3


@pytest.mark.parametrize("mode", ["cache", "blocks", "full"])
def test_modes(trace: str, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", trace, "--mode", mode, "--capacity", "2_000", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["mode"] == mode
    assert run["capacity_pages"] == 2000
    assert (run["latencies"] is not None) == (mode == "full")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--policy", "lur"], "did you mean lru"),
        (["--async-scheduling"], "--async-scheduling goes with --mode full"),
        (["--capacity", "0"], "at least 1 page, or unlimited, not '0'"),
        (["--capacity", "many"], "not 'many'"),
        (["--mode", "cash"], "did you mean cache"),
        (["--page-size", "100"], "multiple or a divisor"),
        (["--page-size", "0"], "at least 1"),
        (["--plot", "p.pdf"], ".svg or .png"),
        (["--mode", "exact"], "no recording"),
    ],
)
def test_refusals(
    trace: str, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", trace, *flags]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert not captured.out


def test_no_matplotlib_says_what_to_install_before_the_work(
    trace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["replay", trace, "--plot", "p.svg"]) == 2
    assert "pip install 'kvpaging[plot]'" in capsys.readouterr().err
    assert not Path("p.svg").exists()


def test_what_serve_is_told_reaches_the_engine(tmp_path: Path) -> None:
    flags = {"record": str(tmp_path / "recording"), "eviction_policy": "arc"}
    options = resolve(flags, {}).settings.engine_options()
    assert options.record == str(tmp_path / "recording")
    assert options.eviction_policy == "arc"
    with pytest.raises(ConfigError, match="did you mean arc"):
        resolve({"eviction_policy": "ark"}, {})


def test_the_page_names_every_policy_mode_and_flag() -> None:
    page = (Path(__file__).parents[2] / "docs" / "replay.md").read_text()
    parser = FlagParser("kvpaging replay", "")
    replay.add_flags(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    told = {"-h", "--help", "--max-num-seqs", "--max-num-batched-tokens"}
    assert not [name for name in (*POLICIES, *(flags - told)) if f"{name}" not in page]


def test_a_missing_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", "/nowhere/trace.jsonl"]) == 2
    assert "can't be read" in capsys.readouterr().err
