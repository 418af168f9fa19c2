from __future__ import annotations

import io
import logging
import sys

import pytest

from kvpaging.base.config import EngineConfig, SchedulerConfig
from kvpaging.engine.messages import Loading
from server.announcement import LoadingProgress, announcement
from server.settings import Settings

CONFIG = EngineConfig(
    model_dir="m",
    architecture="LlamaForCausalLM",
    device="cpu",
    dtype="float32",
    kv_cache_dtype="float32",
    threads=2,
    kernels="native avx2",
    exact=True,
    kv_cache_bytes=2**30,
    vocab_size=1,
    eos_token_ids=(),
    scheduler=SchedulerConfig(100, 16, 1, 16, 64, 8),
    decisions=("dtype float32: the checkpoint's",),
)


def test_it_says_what_the_issue_asks_for() -> None:
    text = "\n".join(announcement(Settings(), CONFIG, ("127.0.0.1", 4321)))
    for fact in (
        "kvpaging-demo (LlamaForCausalLM)",
        "cpu, float32, 2 threads",
        "native avx2 (exact)",
        "100 of 16 tokens: 1600 tokens in 1.00 GiB, float32",
        "dtype float32: the checkpoint's",
        "http://127.0.0.1:4321",
        "curl http://127.0.0.1:4321/generate -H",
    ):
        assert fact in text


@pytest.mark.parametrize(
    ("address", "url"),
    [
        (("0.0.0.0", 80), "http://127.0.0.1:80/"),
        (("::", 80, 0, 0), "http://[::1]:80/"),
        (("192.0.2.7", 80), "http://192.0.2.7:80/"),
    ],
)
def test_the_example_goes_to_an_address_that_can_be_reached(
    address: tuple[object, ...], url: str
) -> None:
    assert announcement(Settings(), CONFIG, address)[-1].split("curl ")[1].startswith(url)


def test_the_example_never_shows_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"api_key": "open sesame"})
    for variable, shown in (("", "YOUR_KEY"), ("open sesame", "${KVPAGING_API_KEY%%,*}")):
        monkeypatch.setenv("KVPAGING_API_KEY", variable)
        text = "\n".join(announcement(settings, CONFIG, ("127.0.0.1", 1)))
        assert "sesame" not in text
        assert f'"Authorization: Bearer {shown}"' in text


def test_progress_without_a_terminal_is_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    progress = LoadingProgress(lambda: now)
    progress.report(Loading("importing torch"))
    for done in range(101):
        now = done / 10
        progress.report(Loading("loading weights", done, 100))
    assert caplog.messages == [
        "importing torch",
        "loading weights 0%",
        "loading weights 50%",
        "loading weights 100%",
    ]


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = LoadingProgress()
    for done in (0, 50, 100):
        progress.report(Loading("loading weights", done, 100))
    progress.close()
    progress.close()
    assert "loading weights" in terminal.getvalue()
    assert "\r" in terminal.getvalue()
