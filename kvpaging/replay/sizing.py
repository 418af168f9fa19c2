"""What to expect of a model in so much memory on such a device, from a trace at given rates.

The same simulation as full mode, with the model's sizes in place of defaults. A device is either
given by its bandwidth and arithmetic, or by step times that were measured (`kvpaging bench`). Knows
no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import IO

import msgspec

from kvpaging.base.errors import ConfigError
from kvpaging.replay.full_mode import Limits, Simulation, StepTimes
from kvpaging.replay.outcome import Outcome
from kvpaging.replay.trace import Trace, TraceRequest


class ModelSize(msgspec.Struct, frozen=True):
    """What memory and time depend on."""

    weight_bytes: int
    num_parameters: int
    kv_bytes_per_token: int
    attention_flops_per_pair: int
    """Operations for a new token with one that it sees, all layers."""
    max_model_len: int


class Expectation(msgspec.Struct, frozen=True):
    """At one rate of arrivals."""

    requests_per_s: float
    num_pages: int
    num_tokens_that_fit: int
    num_requests_that_fit: float
    """Of the trace's mean length, nothing shared."""
    output_tokens_per_s: float
    is_overloaded: bool
    """The queue grew to the end: the trace took a tenth longer than its arrivals."""
    outcome: Outcome

    def as_json(self) -> dict[str, object]:
        """All fields; the outcome's own are inside."""
        fields: dict[str, object] = msgspec.to_builtins(self)
        return fields | {"outcome": self.outcome.as_json()}


def times_of_device(size: ModelSize, bytes_per_s: float, flops: float) -> StepTimes:
    """A device that reads all weights once a step, two operations a parameter and token.

    Optimistic: no device reaches both of its limits.
    """
    return StepTimes(
        fixed_s=size.weight_bytes / bytes_per_s,
        per_new_token_s=2 * size.num_parameters / flops,
        per_context_token_s=size.kv_bytes_per_token / bytes_per_s,
        per_pair_s=size.attention_flops_per_pair / flops,
    )


def at_rate(trace: Trace, requests_per_s: float, num_requests: int | None = None) -> Trace:
    """The trace (or its first `num_requests`) with arrivals at this mean rate."""
    count, last_s = 0, 0.0
    for request in trace:
        count, last_s = count + 1, request.arrival_s
        if count == num_requests:
            break
    if not last_s:
        raise ConfigError(f"{trace.path}: all requests arrive at once; that has no rate")
    scale = (count - 1) / last_s / requests_per_s

    def read(file: IO[bytes]) -> Iterator[TraceRequest]:
        for index, request in enumerate(trace.read(file)):
            if index == num_requests:
                return
            yield replace(request, arrival_s=request.arrival_s * scale)

    return replace(trace, read=read)


def expect(
    trace: Trace,
    size: ModelSize,
    kv_bytes: int,
    times: StepTimes,
    *,
    requests_per_s: float,
    page_size: int,
    limits: Limits,
    policy: str,
    num_requests: int | None = None,
) -> Expectation:
    """Simulate the trace at this rate. Raises ConfigError if the memory holds no page."""
    num_pages = kv_bytes // (size.kv_bytes_per_token * page_size) - 1  # one is scratch
    if num_pages < 1:
        raise ConfigError(
            f"{kv_bytes} bytes are left for KV pages, and one of {page_size} tokens takes "
            f"{size.kv_bytes_per_token * page_size}, beside the scratch page"
        )
    paced = at_rate(trace, requests_per_s, num_requests)
    limits = msgspec.structs.replace(
        limits, max_model_len=min(size.max_model_len, num_pages * page_size)
    )
    outcome = Simulation(paced, policy, num_pages, page_size, limits=limits, times=times).run()
    seconds = outcome.latencies.simulated_s if outcome.latencies else 0.0
    mean = (outcome.num_tokens + outcome.num_output_tokens) / max(1, outcome.num_requests)
    return Expectation(
        requests_per_s=requests_per_s,
        num_pages=num_pages,
        num_tokens_that_fit=num_pages * page_size,
        num_requests_that_fit=num_pages * page_size / max(1.0, mean),
        output_tokens_per_s=outcome.num_output_tokens / max(seconds, 1e-9),
        is_overloaded=seconds > 1.1 * outcome.num_requests / requests_per_s,
        outcome=outcome,
    )
