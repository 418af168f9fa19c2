"""Where the public traces are, and a small made-up one that is always there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpaging.replay.synthetic import conversations, write_mooncake
from kvpaging.replay.trace import Trace, open_trace

WHERE = (
    "set KVPAGING_TRACES to a folder with mooncake-fast25/conversation_trace.jsonl.gz "
    "(github.com/kvcache-ai/Mooncake, FAST25-release/traces) and "
    "azure-llm-2023/AzureLLMInferenceTrace_code.csv.gz "
    "(github.com/Azure/AzurePublicDataset, data)"
)


def public(name: str) -> Path:
    path = Path(os.environ.get("KVPAGING_TRACES", "")) / name
    if "KVPAGING_TRACES" not in os.environ or not path.exists():
        pytest.skip(f"{name} is not here: {WHERE}")
    return path


@pytest.fixture(scope="session")
def mooncake() -> Trace:
    return open_trace(public("mooncake-fast25/conversation_trace.jsonl.gz"))


@pytest.fixture(scope="session")
def azure() -> Trace:
    return open_trace(public("azure-llm-2023/AzureLLMInferenceTrace_code.csv.gz"))


@pytest.fixture(scope="session")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "small.jsonl.gz"
    write_mooncake(conversations(400, seed=7), path)
    return path


@pytest.fixture
def small(small_path: Path) -> Trace:
    return open_trace(small_path)
