"""Captures that fail, without a card: what can go wrong is CUDA's, and is put in its place here."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kernels.jit.graphs import Graphs


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Card:
    """As much of CUDA as a capture needs; ending one raises `error`."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.num_replayed = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {
            "device": lambda device: contextlib.nullcontext(),
            "graph_pool_handle": lambda: (0, 1),
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": lambda: self,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def replay(self) -> None:
        self.num_replayed += 1

    @contextlib.contextmanager
    def graph(self, graph: Card, **options: Any) -> Iterator[None]:
        yield
        if self.error is not None:
            raise self.error


@pytest.fixture
def work() -> Any:
    return lambda: torch.ones(2)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
        RuntimeError("CUDA error: operation failed due to a previous error during capture"),
    ],
)
def test_a_capture_that_fails_is_none_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, work: Any
) -> None:
    Card(error).install(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert Graphs(torch.device("cuda", 0)).capture(work) is None
    [record] = caplog.records
    assert str(error).splitlines()[0] in record.getMessage()
    assert "and more" not in record.getMessage()


def test_work_that_is_wrong_is_no_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(None).install(monkeypatch)

    def wrong() -> torch.Tensor:
        raise TypeError("no such argument")

    with pytest.raises(TypeError, match="no such argument"):
        Graphs(torch.device("cuda", 0)).capture(wrong)


def test_a_capture_is_replayed(monkeypatch: pytest.MonkeyPatch, work: Any) -> None:
    card = Card(None)
    card.install(monkeypatch)
    replay = Graphs(torch.device("cuda", 0)).capture(work)
    assert replay is not None
    assert torch.equal(replay(), torch.ones(2))
    assert card.num_replayed == 1
