"""Lists of pages out of the pool and back, bit by bit, on a CPU and on a card."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import select
from kvpaging.base.ids import PageId
from kvpaging.base.kv_spec import KVSpec
from kvpaging.execution.kv_pool import KVPool
from kvpaging.execution.page_swaps import PageSwaps

SPEC = KVSpec(num_layers=2, num_kv_heads=1, head_dim=4, page_size=2, dtype="int8")
NUM_PAGES = 40

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def pool(request: pytest.FixtureRequest) -> KVPool:
    with torch.inference_mode():  # as the engine makes it
        pool = KVPool(SPEC, NUM_PAGES, torch.device(request.param))
        pool.pages.random_(256)
    return pool


def test_pages_come_out_as_they_were_and_go_in_elsewhere(pool: KVPool) -> None:
    swaps = PageSwaps(pool, select(pool.pages.device))
    before = pool.pages.cpu().clone()
    chosen = [PageId(number) for number in random.sample(range(1, NUM_PAGES + 1), 20)]
    sources, targets = chosen[:10], chosen[10:]
    out = swaps.take_out(sources)
    with torch.inference_mode():
        pool.pages[sources] = 0  # ordered after them
    out.wait()
    assert [bytes(payload) for payload in out.payloads] == [
        before[page].numpy().tobytes() for page in sources
    ]
    payloads = [bytes(p) if i % 2 else p for i, p in enumerate(out.payloads)]
    swaps.put_in(targets, payloads)
    expected = before.clone()
    expected[targets] = before[sources]
    expected[sources] = 0
    assert torch.equal(pool.pages.cpu(), expected)


def test_no_pages_are_no_work(pool: KVPool) -> None:
    swaps = PageSwaps(pool, select(pool.pages.device))
    before = pool.pages.clone()
    out = swaps.take_out([])
    out.wait()
    assert not out.payloads
    swaps.put_in([], [])
    assert torch.equal(pool.pages, before)
