"""Every shipped configuration, compiled for cards that aren't here.

The operations run on tensors without memory and hand over their launches, so what is compiled is
what they would launch. Numbers move between Triton versions: bounds are asserted, not equality.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton")

from jit_compile import Compiled, compile_launch  # noqa: E402

from kernels.jit import TritonOps  # noqa: E402
from kernels.jit.launch import Launch, Target  # noqa: E402
from kernels.jit.triton_ops import TritonLinear  # noqa: E402
from kernels.ops import QUANTISED, KVPages, Linear  # noqa: E402
from kernels.splits import part_bytes  # noqa: E402

TARGETS = {
    "sm_80": Target("cuda", "sm_80"),
    "sm_90": Target("cuda", "sm_90"),
    "sm_100": Target("cuda", "sm_100"),
    "gfx942": Target("hip", "gfx942"),
}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


I8, F8 = torch.int8, torch.float8_e4m3fn


def pages_of(kv_heads: int, head_dim: int, dtype: torch.dtype, page_size: int = 16) -> KVPages:
    """Of one layer of two, page-major."""
    pool = empty(512, 2, 2, kv_heads, page_size, head_dim, dtype=dtype)
    keys, values = pool[:, 0, 0], pool[:, 0, 1]
    if dtype not in QUANTISED:
        return KVPages(keys, values)
    scales = empty(512, 2, 2, kv_heads, page_size, dtype=torch.float32)
    return KVPages(keys, values, scales[:, 0, 0], scales[:, 0, 1])


def attention(
    head_dim: int,
    *,
    featured: bool = False,
    heads: int = 32,
    kv_heads: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    page_dtype: torch.dtype | None = None,
    page_size: int = 16,
    state: bool = False,
    queries: int = 2000,
) -> Callable[[TritonOps], object]:
    """A mixed batch: all three kernels. Heads as in Llama 3 8B, if not given.

    With no more queries than the 64 sequences it is a step of decode: two kernels, other ones.
    """

    def call(ops: TritonOps) -> object:
        attend = ops.paged_attention_state if state else ops.paged_attention
        return attend(
            empty(queries, heads, head_dim, dtype=dtype),
            pages_of(kv_heads, head_dim, page_dtype or dtype, page_size),
            empty(64, 256, dtype=torch.int32),
            empty(64, dtype=torch.int32),
            empty(65, dtype=torch.int32),
            scale=0.1,
            window=4096 if featured else None,
            soft_cap=50.0 if featured else None,
            sinks=empty(heads, dtype=torch.float32) if featured else None,
        )

    return call


decode = partial(attention, queries=64)
"""As each step of decode launches it."""


def linear(
    rows: int, out_features: int, dtype: torch.dtype = torch.bfloat16
) -> Callable[[TritonOps], object]:
    def call(ops: TritonOps) -> torch.Tensor:
        weight = ops.prepare_linear(empty(out_features, 4096, dtype=dtype))
        return ops.linear(empty(rows, 4096, dtype=dtype), weight)

    return call


def head(rows: int) -> Callable[[TritonOps], object]:
    """Logits in float32; what computes them without `exact` too."""

    def call(ops: TritonOps) -> torch.Tensor:
        return ops.linear_float32(empty(rows, 4096), ops.prepare_linear(empty(128256, 4096)))

    return call


def grouped(ops: TritonOps) -> torch.Tensor:
    experts = [ops.prepare_linear(empty(1536, 2048)) for _ in range(128)]
    return ops.grouped_linear(
        empty(64, 2048), ops.prepare_experts(experts), empty(64, dtype=torch.int64)
    )


def int8_linear(rows: int) -> Callable[[TritonOps], object]:
    def call(ops: TritonOps) -> torch.Tensor:
        return ops.linear(empty(rows, 4096), int8_weight(4096, 4096))

    return call


def int8_weight(out_features: int, in_features: int) -> TritonLinear:
    whole = empty(out_features, in_features, dtype=torch.int8)
    scales = empty(out_features, dtype=torch.float32)
    return TritonLinear(whole, None, scales, torch.bfloat16)


def int8_grouped(ops: TritonOps) -> torch.Tensor:
    experts: list[Linear] = [int8_weight(1536, 2048) for _ in range(128)]
    return ops.grouped_linear(
        empty(64, 2048), ops.prepare_experts(experts), empty(64, dtype=torch.int64)
    )


def rope_store(ops: TritonOps, page_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    norm = empty(128)
    return ops.rope_store(
        empty(64, 48 * 128),
        empty(64, dtype=torch.int32),
        empty(4096, 128, dtype=torch.float32),
        pages_of(8, 128, page_dtype),
        empty(64, dtype=torch.int64),
        q_norm=norm,
        k_norm=norm,
    )


def store_kv(ops: TritonOps, page_dtype: torch.dtype = torch.bfloat16) -> None:
    rows, slots = empty(64, 8, 128), empty(64, dtype=torch.int64)
    ops.store_kv(rows, rows, pages_of(8, 128, page_dtype), slots)


def row_operations(ops: TritonOps) -> None:
    ops.add_rms_norm(empty(64, 4096), empty(64, 4096), empty(4096), 1e-6)
    ops.rms_norm(empty(64, 16384), empty(16384), 1e-6)
    ops.silu_mul(empty(64, 28672))
    ops.gelu_mul(empty(64, 28672))
    ops.log_softmax(empty(64, 128256, dtype=torch.float32))
    places = empty(64, dtype=torch.int64)
    ops.copy_pages(empty(512, 2, 2, 8, 16, 128), places, places)
    lse = empty(64, 32, dtype=torch.float32)
    ops.merge_state(empty(64, 32, 128), lse, empty(64, 32, 128), lse)


def sample(ops: TritonOps) -> torch.Tensor:
    share, count = empty(64, dtype=torch.float32), empty(64, dtype=torch.int32)
    logits, seeds = empty(64, 128256, dtype=torch.float32), empty(64, dtype=torch.int64)
    return ops.sample(logits, share, count, share, share, seeds, count, count)


MATRIX_CALLS = {
    "attention 64": attention(64),
    "attention 128": attention(128),
    "attention 128 window cap sinks": attention(128, featured=True),
    "attention 128 state": attention(128, state=True),
    "attention 256 window cap sinks": attention(256, featured=True),
    "attention 128 of 64 heads on one": attention(128, heads=64, kv_heads=1),
    "attention 64 int8": attention(64, page_dtype=I8),
    "attention 128 int8": attention(128, page_dtype=I8),
    "attention 128 window cap sinks int8": attention(128, featured=True, page_dtype=I8),
    "attention 256 window cap sinks int8": attention(256, featured=True, page_dtype=I8),
    "decode 128": decode(128),
    "linear 1 narrow": linear(1, 4096),
    "linear 32 wide": linear(32, 28672),
    "linear 200": linear(200, 4096),
    "linear 4096": linear(4096, 4096),
    "head 1": head(1),
    "head 512": head(512),
    "grouped linear": grouped,
    "int8 linear 1": int8_linear(1),
    "int8 linear 4096": int8_linear(4096),
    "int8 grouped linear": int8_grouped,
}
MORE_CALLS = {
    "attention 64 window cap sinks int8": attention(64, featured=True, page_dtype=I8),
    "attention 96": attention(96),
    "attention 192 of 16 heads on 8": attention(192, heads=16),
    "attention 128 pages of 64": attention(128, page_size=64),
    "attention 128 float16": attention(128, dtype=torch.float16),
    "decode 64": decode(64),
    "decode 128 window cap sinks": decode(128, featured=True),
    "decode 128 pages of 128": decode(128, page_size=128),
    "decode 128 int8": decode(128, page_dtype=I8),
    "decode 128 window cap sinks int8": decode(128, featured=True, page_dtype=I8),
    "decode 256 window cap sinks": decode(256, featured=True),
    "linear 4096 float16": linear(4096, 4096, torch.float16),
    "head 256": head(256),
}
"""For sm_90, which is measured first; for every target with KVPAGING_EVERY_TARGET=1."""
MORE_TARGETS = TARGETS if os.environ.get("KVPAGING_EVERY_TARGET") == "1" else ("sm_90",)
OTHER_CALLS = {
    "attention 128 float32": attention(128, dtype=torch.float32),
    "decode 128 float32": decode(128, dtype=torch.float32),
    "linear 4096 float32": linear(4096, 4096, torch.float32),
    "rope_store": rope_store,
    "rope_store int8": partial(rope_store, page_dtype=I8),
    "store_kv": store_kv,
    "store_kv int8": partial(store_kv, page_dtype=I8),
    "rows": row_operations,
    "sample": sample,
}
FP8_CALLS = {
    "attention 64 fp8": attention(64, page_dtype=F8),
    "attention 128 fp8": attention(128, page_dtype=F8),
    "attention 128 window cap sinks fp8": attention(128, featured=True, page_dtype=F8),
    "decode 128 fp8": decode(128, page_dtype=F8),
    "decode 128 window cap sinks fp8": decode(128, featured=True, page_dtype=F8),
    "attention 256 window cap sinks fp8": attention(256, featured=True, page_dtype=F8),
    "rope_store fp8": partial(rope_store, page_dtype=F8),
}


def record(target: Target, call: Callable[[TritonOps], object], *, exact: bool) -> list[Launch]:
    launches: list[Launch] = []
    call(TritonOps("meta", exact=exact, target=target, runner=launches.append))
    assert launches
    return launches


def check_budget(launch: Launch, compiled: Compiled, target: Target) -> None:
    what = f"{launch.kernel.__name__} {launch.schedule} on {target.arch}: {compiled}"
    assert compiled.spilled == 0, what
    assert compiled.count("LDL|STL|scratch_") == 0, what
    assert compiled.shared_bytes <= target.shared_bytes, what
    # Bytes come eight at a time on a card whose tiles have fewer of them to a thread.
    wide = "dwordx[24]" if launch.arguments.get("HAS_SCALES") else "dwordx4"
    assert compiled.count(rf"LDG(STS)?\..*128|(global|buffer)_load_{wide}") > 0, what


def matrix_instruction(launch: Launch, target: Target) -> str:
    if target.backend == "hip":
        rows = launch.arguments.get("query", launch.arguments.get("x"))
        return f"v_mfma_f32_16x16x16_{'f16' if rows.dtype == torch.float16 else 'bf16'}"
    large = launch.arguments["BLOCK_M"] >= 64
    if target.arch == "sm_90" and large:
        return "HGMMA"
    return "UTCHMMA" if target.arch == "sm_100" and large else "HMMA"


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("name", MATRIX_CALLS)
def test_exact_kernels_use_matrix_instructions_and_spill_nothing(arch: str, name: str) -> None:
    check_exact(TARGETS[arch], MATRIX_CALLS[name])


@pytest.mark.slow
@pytest.mark.parametrize("arch", MORE_TARGETS)
@pytest.mark.parametrize("name", MORE_CALLS)
def test_more_exact_kernels_do_likewise(arch: str, name: str) -> None:
    check_exact(TARGETS[arch], MORE_CALLS[name])


def check_exact(target: Target, call: Callable[[TritonOps], object]) -> None:
    used = []
    for launch in record(target, call, exact=True):
        compiled = compile_launch(launch, target)
        check_budget(launch, compiled, target)
        if "BLOCK_M" in launch.arguments:
            instruction = matrix_instruction(launch, target)
            used.append({opcode for opcode in compiled.instructions if instruction in opcode})
    # In one shape, where both attention kernels promise the same bits.
    assert used[0]
    assert all(opcodes == used[0] for opcodes in used)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize(
    "name",
    [
        "attention 128",
        "attention 256 window cap sinks",
        "attention 128 int8",
        "attention 256 window cap sinks int8",
        "decode 128",
        "head 1",
        "head 512",
    ],
)
def test_kernels_without_exact_spill_nothing(arch: str, name: str) -> None:
    target = TARGETS[arch]
    for launch in record(target, MATRIX_CALLS[name], exact=False):
        check_budget(launch, compile_launch(launch, target), target)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("name", OTHER_CALLS)
def test_other_kernels_compile(arch: str, name: str) -> None:
    target = TARGETS[arch]
    for launch in record(target, OTHER_CALLS[name], exact=True):
        check_budget(launch, compile_launch(launch, target), target)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("name", FP8_CALLS)
def test_kernels_with_pages_of_e4m3_spill_nothing(arch: str, name: str) -> None:
    target = TARGETS[arch]
    for launch in record(target, FP8_CALLS[name], exact=True):
        check_budget(launch, compile_launch(launch, target), target)


def test_only_some_targets_have_e4m3() -> None:
    has_it = {
        name: F8 in TritonOps("meta", target=target, runner=lambda _: None).page_dtypes
        for name, target in TARGETS.items()
    }
    assert has_it == {"sm_80": False, "sm_90": True, "sm_100": True, "gfx942": False}


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [8, 32, 512])
@pytest.mark.parametrize("page_dtype", [torch.bfloat16, I8], ids=str)
def test_exact_attention_takes_one_step_and_one_kind_of_instruction(
    arch: str, head_dim: int, heads: int, page_dtype: torch.dtype
) -> None:
    target = TARGETS[arch]
    call = attention(head_dim, heads=heads, page_dtype=page_dtype)
    extend, decode, _ = record(target, call, exact=True)
    for name in ("TILE", "SPLIT", "BLOCK_D"):
        assert extend.arguments[name] == decode.arguments[name]
    assert matrix_instruction(extend, target) == matrix_instruction(decode, target)
    # Rows of a warp: then a row's weights lie in the same threads, and add up in the same order.
    rows = [launch.arguments["BLOCK_M"] // launch.schedule.num_warps for launch in (extend, decode)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("num_pages", [1, 16, 17, 200])
def test_attention_keeps_no_more_of_splits_than_the_estimate_says(num_pages: int) -> None:
    num_seqs, heads, head_dim = 20, 32, 128
    most = part_bytes(num_seqs, num_pages * 16, heads, head_dim)
    seen = set()
    for seqs, queries in ((20, 20), (3, 16), (1, 500), (20, 500), (20, 21)):
        call = partial(
            TritonOps.paged_attention,
            query=empty(queries, heads, head_dim),
            pages=pages_of(8, head_dim, torch.bfloat16),
            page_tables=empty(seqs, num_pages, dtype=torch.int32),
            seq_lens=empty(seqs, dtype=torch.int32),
            query_starts=empty(seqs + 1, dtype=torch.int32),
            scale=0.1,
        )
        for launch in record(TARGETS["sm_90"], call, exact=True):
            if "part_acc" in launch.arguments:
                seen.add(sum(launch.arguments[name].nbytes for name in ("part_acc", "part_state")))
    assert max(seen) == most
    assert (most > 0) == (num_pages > 16)


@pytest.mark.parametrize("arch", TARGETS)
def test_exact_linears_take_one_step_and_one_kind_of_instruction(arch: str) -> None:
    target = TARGETS[arch]
    launches = [
        record(target, linear(rows, 4096), exact=True)[0] for rows in (1, 17, 64, 65, 256, 257)
    ]
    assert len({launch.arguments["BLOCK_K"] for launch in launches}) == 1
    assert len({matrix_instruction(launch, target) for launch in launches}) == 1


GROUPS = (*range(1, 17), 24, 32, 40, 64, 71)
HEAD_DIMS = range(16, 257, 8)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("arch", TARGETS)
def test_every_head_size_and_group_has_launches_that_a_card_takes(arch: str, exact: bool) -> None:
    """Triton takes warps and the sizes of tiles in powers of two, and so many threads a program."""
    target = TARGETS[arch]
    most = 16 if target.backend == "hip" else 32  # of 64 threads, or 32
    seen = set()
    for group, head_dim in product(GROUPS, HEAD_DIMS):
        for queries, page_dtype in product((64, 2000), (torch.bfloat16, I8)):
            call = attention(
                head_dim, heads=2 * group, kv_heads=2, page_dtype=page_dtype, queries=queries
            )
            for launch in record(target, call, exact=exact):
                what = (group, head_dim, queries, page_dtype, launch)
                seen.add(launch.kernel.__name__)
                assert is_power_of_two(launch.schedule.num_warps), what
                assert launch.schedule.num_warps <= most, what
                assert launch.schedule.num_stages >= 1, what
                sizes = {
                    name: value
                    for name, value in launch.arguments.items()
                    if name.startswith("BLOCK_") or name == "TILE"
                }
                assert all(is_power_of_two(size) for size in sizes.values()), what
                assert sizes.get("BLOCK_M", group) >= group, what
                assert sizes["BLOCK_D"] >= head_dim, what
    assert seen == {"decode_kernel", "extend_kernel", "combine_kernel"}


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
