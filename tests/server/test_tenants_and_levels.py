"""Two tenants on one server with a disk level and a remote one, through a kill and a new start.

Each finds its own pages again and none of the other's; who leaves the file of keys and comes back
finds its own; and emptying the cache empties every level for both.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import redis
from http_app import wait_for
from redis_servers import redis_server

COMMAND = (sys.executable, "-P", "-m", "server", "serve", "--port", "0", "--threads", "1")
LIMITS = ("--kv-cache-memory", "16MiB", "--max-num-seqs", "4", "--max-model-len", "512")


def write_keys(path: Path, *tenants: str) -> None:
    lines = [
        {"key": f"sk-{name}", "tenant": name, "role": "operator" if name == "ops" else "user"}
        for name in tenants
    ]
    aside = path.with_name("keys.new")
    aside.write_text("\n".join(map(json.dumps, lines)))
    aside.chmod(0o600)
    aside.rename(path)


class Served:
    def __init__(self, *flags: str):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KVPAGING_")}
        self.process = subprocess.Popen(
            [*COMMAND, *LIMITS, *flags], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        found = None
        while found is None:
            line = self.process.stdout.readline()
            assert line, "it ended before it was ready"
            found = re.search(r"address +(http://\S+)", line)
        self.url = found[1]
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def kill(self) -> None:
        """Both processes, at once and without a word."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (*map(int, children), pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self.process.wait(20)

    def call(self, tenant: str, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer sk-{tenant}"}
        return httpx.request(method, self.url + path, json=body, headers=headers, timeout=60)

    def ask(self, tenant: str, prompt: list[int]) -> tuple[dict[str, int], list[int]]:
        """Pages found by level, and the tokens of the answer."""
        body = {"prompt": prompt, "max_new_tokens": 4, "seed": 7, "explain": True}
        body["ignore_eos"] = True
        answer = self.call(tenant, "POST", "/generate", body).raise_for_status().json()
        [told] = answer["explanations"]
        found = {level["level"]: level["pages"] for level in told["levels"] if level["pages"]}
        return found, answer["outputs"][0]["token_ids"]

    def level_pages(self) -> dict[str, int | None]:
        stats = self.call("ops", "GET", "/cache/stats").raise_for_status().json()
        return {level["level"]: level["pages"] for level in stats["levels"]}


@contextlib.contextmanager
def served(*flags: str) -> Iterator[Served]:
    server = Served(*flags)
    try:
        yield server
    finally:
        server.kill()


def test_each_tenant_finds_its_own_after_a_kill_and_nothing_after_the_cache_was_emptied(
    tmp_path: Path,
) -> None:
    lot = random.Random()
    own = {name: [lot.randrange(10, 6000) for _ in range(200)] for name in ("alice", "bob")}
    keys, secret = tmp_path / "keys", tmp_path / "secret"
    write_keys(keys, "alice", "bob", "ops")
    secret.write_bytes(os.urandom(32))
    secret.chmod(0o600)
    with redis_server(tmp_path) as remote:
        flags = ("--api-keys", str(keys), "--cache-secret", str(secret))
        flags += ("--disk-cache", str(tmp_path / "pages"), "--remote-cache", remote)
        there = redis.Redis.from_url(remote)
        told: dict[str, list[int]] = {}
        with served(*flags) as server:
            for name, prompt in own.items():
                found, told[name] = server.ask(name, prompt)
                assert found == {}
            wait_for(lambda: server.level_pages()["disk"] == 24)
            wait_for(there.dbsize)  # most often all 24; what comes late is not kept there
        with served(*flags) as server:
            assert server.level_pages()["disk"] == 24
            # The other first, so that nothing on the device could help.
            assert server.ask("bob", own["alice"])[0] == {}
            assert server.ask("alice", own["bob"])[0] == {}
            for name, prompt in own.items():
                assert server.ask(name, prompt) == ({"disk": 12}, told[name])
            write_keys(keys, "alice", "ops")
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda: server.call("bob", "GET", "/version").status_code == 401)
            assert server.ask("alice", own["alice"])[0] == {"device": 12}
            write_keys(keys, "alice", "bob", "ops")
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda: server.call("bob", "GET", "/version").status_code == 200)
            assert server.ask("bob", own["bob"]) == ({"device": 12}, told["bob"])

            wait_for(lambda: server.level_pages()["disk"] == 48)
            assert there.dbsize() > 0
            assert server.call("alice", "DELETE", "/cache").status_code == 403
            before = time.monotonic()
            emptied = server.call("ops", "DELETE", "/cache").raise_for_status().json()["pages"]
            assert time.monotonic() - before < 30
            assert emptied == {"device": 48, "disk": 48, "remote": None}
            assert there.dbsize() == 0
            assert server.level_pages()["disk"] == 0
            for name, prompt in own.items():
                assert server.ask(name, prompt) == ({}, told[name])
