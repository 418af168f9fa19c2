from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from kvpaging.base.errors import ConfigError
from kvpaging.replay.trace import open_trace

LINE = '{"timestamp": %d, "input_length": 700, "output_length": 9, "hash_ids": [3, 4]}\n'
CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,40,10
2023-11-16 18:17:05.0319600,16,8
"""


def test_mooncake_packed_or_not(tmp_path: Path) -> None:
    text = LINE % 0 + LINE % 1500
    (tmp_path / "plain").write_text(text)
    (tmp_path / "packed").write_bytes(gzip.compress(text.encode()))
    plain, packed = (list(open_trace(tmp_path / name)) for name in ("plain", "packed"))
    assert plain == packed
    assert plain[1].arrival_s == 1.5
    assert plain[1].blocks == [3, 4]
    assert (plain[1].num_prompt_tokens, plain[1].num_output_tokens) == (700, 9)


def test_azure(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(CSV)
    first, second = open_trace(path)
    assert second.arrival_s == pytest.approx(1.052)
    assert (first.num_prompt_tokens, first.num_output_tokens) == (40, 10)
    assert len(first.blocks) == 3
    assert set(first.blocks).isdisjoint(second.blocks)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is no trace"),
        ("hello\n", "is no trace"),
        (LINE % 5 + LINE % 4, "request 2 arrives before"),
        (LINE % 5 + "{}\n", "line 2"),
        (LINE % 5 + "nonsense\n", "line 2"),
        (CSV + "yesterday,1,1\n", "line 4"),
        (CSV + "2023-11-16 18:17:06,many,1\n", "line 4"),
        ('{"kvpaging_recording": 99}\n', "recording"),
    ],
)
def test_what_is_no_trace_says_where(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        list(open_trace(path))


def test_no_file_and_half_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        open_trace(tmp_path / "missing")
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress((LINE % 0 * 1000).encode())[:40])
    with pytest.raises(ConfigError, match="unpack"):
        open_trace(packed)
    text = "".join(LINE % i for i in range(20_000))
    packed.write_bytes(gzip.compress(text.encode())[:-1000])
    trace = open_trace(packed)
    with pytest.raises(ConfigError, match=r"packed: .*end"):
        list(trace)
