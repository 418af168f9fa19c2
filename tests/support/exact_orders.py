"""What the tests of "cached equals computed" over HTTP share: seeds, requests, and sizes of pools.

`EXACT_ROUNDS=40` runs as many rounds; `EXACT_SEED` repeats one run.
"""

from __future__ import annotations

import os
import random
import secrets
import zlib
from typing import Any

from kvpaging.base.kv_spec import KVSpec
from kvpaging.execution.model_config import ModelConfig

_ROUNDS = int(os.environ.get("EXACT_ROUNDS", "1"))
# Afresh in each run, and the same in all of its workers: it is part of the tests' names.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", secrets.token_hex(8))
_SEED = int(os.environ.get("EXACT_SEED", zlib.crc32(_RUN.encode())))
SEEDS = [f"{_SEED}-{i}" for i in range(_ROUNDS)]
"""One for each round."""

DTYPES = ("float32", "bfloat16")
MAX_MODEL_LEN = 112


def order(rng: random.Random) -> dict[str, Any]:
    """A request's body. Two of them, however short, need more than `MAX_MODEL_LEN` slots."""
    return {
        "prompt": [rng.randrange(3, 128) for _ in range(rng.randint(30, 45))],
        "max_new_tokens": rng.randint(40, 60),
        "temperature": rng.choice([0.0, 0.8, 1.3]),
        "top_p": rng.choice([1.0, 0.9]),
        "repetition_penalty": rng.choice([1.0, 1.2]),
        "frequency_penalty": rng.choice([0.0, 0.5]),
        "seed": rng.getrandbits(63),
        "n": rng.choice([1, 1, 1, 2]),
        "logprobs": 3,
        "ignore_eos": True,
    }


def pool_bytes(model: ModelConfig, page_size: int, num_pages: int, dtype: str) -> int:
    """Bytes of a pool of so many pages, the scratch page beside them."""
    spec = KVSpec(model.num_layers, model.num_kv_heads, model.head_dim, page_size, dtype)
    return (num_pages + 1) * spec.page_bytes
