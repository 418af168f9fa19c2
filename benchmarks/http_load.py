"""Load over HTTP on any server with the OpenAI completions route.

Each client sends one streamed request after the other, with fixed lengths (`ignore_eos`) and
prompts given as token ids drawn afresh. Three workloads:

    short    128 tokens in, 128 out
    long     1,024 in, 16 out
    shared   1,024 tokens that all share and 64 of their own in, 64 out

    python benchmarks/http_load.py --url http://127.0.0.1:8000 --model NAME --vocab 32000 \
        [--workload short --clients 8 --requests 4] [--json]

Knows only the wire format, so that servers can be measured side by side with the same client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

WORKLOADS = {"short": (0, 128, 128), "long": (0, 1024, 16), "shared": (1024, 64, 64)}
"""Shared tokens, own tokens, tokens out."""


@dataclass(frozen=True)
class Timing:
    """One answer, in seconds from the sending of its request."""

    first_token_s: float
    last_token_s: float
    num_tokens: int


@dataclass(frozen=True)
class Row:
    """One cell of the table."""

    workload: str
    clients: int
    requests: int
    output_tokens_per_s: float
    ttft_p50_ms: float
    tpot_p50_ms: float


async def complete(url: str, body: dict[str, object]) -> Timing:
    """Send one streamed completion and time its events. Raises RuntimeError on a bad answer."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    started = time.perf_counter()
    writer.write(head.encode() + payload)
    await writer.drain()
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status!r}: {(await reader.read())[-500:]!r}")
    first = last = 0.0
    num_tokens = 0
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(str(event))
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
        if event.get("choices"):
            last = time.perf_counter() - started
            first = first or last
    writer.close()
    return Timing(first, last, num_tokens)


async def measure(
    url: str, model: str, vocab: int, workload: str, clients: int, requests: int, seed: int
) -> Row:
    """Run `clients` clients with `requests` requests each; raises if an answer is too short."""
    num_shared, num_own, num_out = WORKLOADS[workload]
    rng = random.Random(seed)
    shared = [rng.randrange(10, vocab) for _ in range(num_shared)]
    timings: list[Timing] = []

    async def client() -> None:
        for _ in range(requests):
            prompt = shared + [rng.randrange(10, vocab) for _ in range(num_own)]
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": num_out,
                "min_tokens": num_out,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            timings.append(await complete(url, body))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    elapsed = time.perf_counter() - started
    short = [t.num_tokens for t in timings if t.num_tokens != num_out]
    if short:
        raise RuntimeError(f"answers of {short} tokens instead of {num_out}")
    return Row(
        workload,
        clients,
        len(timings),
        sum(t.num_tokens for t in timings) / elapsed,
        statistics.median(t.first_token_s for t in timings) * 1e3,
        statistics.median((t.last_token_s - t.first_token_s) / (num_out - 1) for t in timings)
        * 1e3,
    )


async def run(arguments: argparse.Namespace) -> list[Row]:
    """All chosen cells, one after the other, after one request to warm up."""
    seed = arguments.seed if arguments.seed is not None else random.randrange(1 << 30)
    where = (arguments.url, arguments.model, arguments.vocab)
    await measure(*where, "short", 1, 1, seed)
    # Each cell draws prompts of its own: none finds what another left in the server's cache.
    cells = [
        (workload, clients) for workload in arguments.workload for clients in arguments.clients
    ]
    return [
        await measure(*where, workload, clients, arguments.requests, seed + 1 + index)
        for index, (workload, clients) in enumerate(cells)
    ]


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="kvpaging-demo")
    parser.add_argument("--vocab", type=int, default=6000)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = asyncio.run(run(arguments))
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"{'workload':>9} {'clients':>8} {'tokens/s':>9} {'ttft ms':>9} {'tpot ms':>9}")
    for row in rows:
        print(
            f"{row.workload:>9} {row.clients:8} {row.output_tokens_per_s:9.1f} "
            f"{row.ttft_p50_ms:9.1f} {row.tpot_p50_ms:9.2f}"
        )


if __name__ == "__main__":
    main()
