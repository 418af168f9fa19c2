"""What the server says of itself at start, for people: how far the load is, then what runs where.

Knows how to say it, not when.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import sys
from importlib.metadata import version
from typing import Any, Final

from tqdm import tqdm

from kvpaging.base.clock import Clock, monotonic
from kvpaging.base.config import EngineConfig
from kvpaging.engine.messages import Loading
from server.settings import Settings

_logger = logging.getLogger(__name__)

LINE_INTERVAL_S: Final = 5.0
EXAMPLE: Final = {"prompt": "def read_lines(path):\n", "max_new_tokens": 48, "temperature": 0}


class LoadingProgress:
    """A bar on a terminal; elsewhere a log line at each new stage, and now and then in it."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._is_terminal = sys.stderr.isatty()
        self._bar: Any = None  # tqdm has no types
        self._stage = ""
        self._said_at = 0.0

    def report(self, loading: Loading) -> None:
        """Show one report of the engine."""
        if self._is_terminal and loading.total_bytes:
            self._draw(loading)
            return
        now = self._clock()
        if loading.stage != self._stage or now - self._said_at >= LINE_INTERVAL_S:
            self._stage, self._said_at = loading.stage, now
            share = loading.done_bytes / loading.total_bytes if loading.total_bytes else None
            _logger.info("%s%s", loading.stage, "" if share is None else f" {share:.0%}")

    def _draw(self, loading: Loading) -> None:
        if self._bar is None or self._bar.desc != loading.stage + ": ":
            self.close()
            self._bar = tqdm(
                desc=loading.stage,
                total=loading.total_bytes,
                unit="B",
                unit_scale=True,
                leave=False,
                file=sys.stderr,
            )
        self._bar.update(loading.done_bytes - self._bar.n)

    def close(self) -> None:
        """Remove the bar. Idempotent."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def announcement(settings: Settings, config: EngineConfig, address: tuple[Any, ...]) -> list[str]:
    """The lines that say what serves, with a `curl` line that works when pasted.

    `address` is the listening socket's, whose port is real where 0 was asked for.
    """
    scheduler = config.scheduler
    num_tokens = scheduler.num_pages * scheduler.page_size
    exact = "exact" if config.exact else "not exact"
    facts = [
        ("model", f"{settings.model_name} ({config.architecture})"),
        ("device", f"{config.device}, {_numbers(config)}, {config.threads} threads"),
        ("kernels", f"{config.kernels} ({exact})"),
        (
            "KV pages",
            f"{scheduler.num_pages} of {scheduler.page_size} tokens: {num_tokens} tokens in "
            f"{config.kv_cache_bytes / 2**30:.2f} GiB, {config.kv_cache_dtype}",
        ),
        *(("decided", decision) for decision in config.decisions),
        ("address", _url(address[0], address[1])),
        ("try", _curl(settings, address)),
    ]
    return [f"kvpaging {version('kvpaging')} is ready", *(f"  {k:<8}  {v}" for k, v in facts)]


def _numbers(config: EngineConfig) -> str:
    if config.quantization is None:
        return config.dtype
    return f"{config.dtype} with {config.quantization} weights"


def _curl(settings: Settings, address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    key = (
        ""
        if settings.api_key is None and settings.api_keys is None
        else f' -H "Authorization: Bearer {settings.key_for_shell()}"'
    )
    body = json.dumps(EXAMPLE)
    return f"curl {_url(host, port)}/generate{key} -H 'content-type: application/json' -d '{body}'"


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
