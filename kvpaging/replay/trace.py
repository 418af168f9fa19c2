"""Traces of requests: what is read from files, as one kind of value.

    Mooncake   JSONL: timestamp (ms), input_length, output_length, hash_ids (one a block of 512
               tokens, the last one partial; equal ids mean an equal prefix up to there)
    Azure      CSV: TIMESTAMP, ContextTokens, GeneratedTokens; nothing says what was alike
    recording  of this server, see `kvpaging.replay.recording`

Each may be compressed with gzip. A trace is read anew each time it is gone through, line by line.
Knows nothing of caches.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Final

import msgspec

from kvpaging.base.errors import ConfigError

MOONCAKE_BLOCK_SIZE: Final = 512
DEFAULT_BLOCK_SIZE: Final = 16
"""For traces that know lengths only."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request as a trace tells it."""

    arrival_s: float
    """From the trace's beginning."""
    num_prompt_tokens: int
    num_output_tokens: int
    blocks: Sequence[int]
    """What the prompt's blocks hold: equal ids mean an equal prefix up to there."""
    output_blocks: Sequence[int] = ()
    """The same for the blocks that the output filled, where the trace knows."""


@dataclass(frozen=True)
class Trace:
    """A file of requests in order of arrival; iterating reads it from its beginning."""

    path: Path
    block_size: int
    """Tokens that one id stands for."""
    read: Callable[[IO[bytes]], Iterator[TraceRequest]]

    def __iter__(self) -> Iterator[TraceRequest]:
        before_s = 0.0
        try:
            with open_binary(self.path) as file:
                for number, request in enumerate(self.read(file), 1):
                    if request.arrival_s < before_s:
                        raise ConfigError(f"request {number} arrives before the one before it")
                    before_s = request.arrival_s
                    yield request
        except (ConfigError, OSError, EOFError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path}: {error}") from None


def open_binary(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked if it is compressed. Raises ConfigError."""
    try:
        file = path.open("rb")
        magic = file.read(2)
        file.seek(0)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    return gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file  # type: ignore[return-value]


def split_pages(
    blocks: Sequence[int], block_size: int, page_size: int, num_tokens: int
) -> list[int]:
    """Ids of the pages of `page_size` tokens that hold `num_tokens` tokens in these blocks.

    One size must be a multiple of the other (ConfigError): a page within a block is as alike as the
    block, and a page of several blocks as the last of them.
    """
    if page_size == block_size:
        return list(blocks)
    num_pages = min(-(-num_tokens // page_size), -(-len(blocks) * block_size // page_size))
    if block_size % page_size == 0:
        ratio = block_size // page_size
        return [blocks[i // ratio] * ratio + i % ratio for i in range(num_pages)]
    if page_size % block_size == 0:
        ratio = page_size // block_size
        last = len(blocks) - 1
        return [blocks[min((i + 1) * ratio - 1, last)] for i in range(num_pages)]
    raise ConfigError(
        f"the page size is {page_size} and must be a multiple or a divisor of the trace's "
        f"block of {block_size} tokens"
    )


class _MooncakeLine(msgspec.Struct, gc=False):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_mooncake(lines: Iterable[bytes]) -> Iterator[TraceRequest]:
    """Requests of Mooncake's JSONL. Raises ConfigError with the line's number."""
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, line in enumerate(lines, 1):
        try:
            entry = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"line {number}: {error}") from None
        yield TraceRequest(
            entry.timestamp / 1000, entry.input_length, entry.output_length, entry.hash_ids
        )


def read_azure(lines: Iterable[bytes]) -> Iterator[TraceRequest]:
    """Requests of Azure's CSV; no two have a block in common. Raises ConfigError."""
    start: datetime | None = None
    num_blocks = 0
    rows = csv.DictReader(line.decode() for line in lines)
    for number, row in enumerate(rows, 2):
        try:
            arrival = datetime.fromisoformat(row["TIMESTAMP"])
            num_prompt, num_output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"line {number}: {error!r}") from None
        start = start or arrival
        first, num_blocks = num_blocks, num_blocks + -(-num_prompt // DEFAULT_BLOCK_SIZE)
        yield TraceRequest(
            (arrival - start).total_seconds(), num_prompt, num_output, range(first, num_blocks)
        )


def open_trace(path: Path) -> Trace:
    """A trace in whichever format its first line shows. Raises ConfigError."""
    from kvpaging.replay.recording import read_header, read_requests

    with open_binary(path) as file:
        try:
            first = file.readline()
        except (OSError, EOFError) as error:
            raise ConfigError(f"{path} can't be unpacked: {error}") from None
    if b'"hash_ids"' in first:
        return Trace(path, MOONCAKE_BLOCK_SIZE, read_mooncake)
    if first.startswith(b"TIMESTAMP,"):
        return Trace(path, DEFAULT_BLOCK_SIZE, read_azure)
    if b'"kvpaging_recording"' in first:
        return Trace(path, read_header(first).scheduler.page_size, read_requests)
    raise ConfigError(
        f"{path} is no trace: its first line is neither Mooncake's JSONL (hash_ids), nor Azure's "
        "CSV (TIMESTAMP,ContextTokens,GeneratedTokens), nor a recording of this server"
    )
