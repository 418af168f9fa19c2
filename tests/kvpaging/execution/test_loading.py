"""What is decided at start, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from checkpoints import case, make
from ops_paths import cpu_paths

from kvpaging.base.config import EngineConfig, EngineOptions
from kvpaging.base.errors import ConfigError
from kvpaging.base.kv_spec import KVSpec
from kvpaging.execution.decode_graphs import GRAPH_BYTES
from kvpaging.execution.loading import _activation_bytes, _kv_memory_bytes, load_executor
from kvpaging.execution.memory import _cgroup_bytes, available_bytes
from kvpaging.execution.model_config import read_model_config

KV_BYTES = 4 * 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    make(case("llama-gqa"), directory, dtype=torch.bfloat16)
    return directory


def resolved(checkpoint: Path, **options: Any) -> EngineConfig:
    given = {"device": "cpu", "threads": 1, "kv_cache_memory_bytes": KV_BYTES, **options}
    config, executor = load_executor(EngineOptions(model=str(checkpoint), **given))
    executor.close()
    return config


@pytest.mark.parametrize("path", cpu_paths())
def test_torch_has_no_threads_beside_those_of_the_kernels(checkpoint: Path, path: str) -> None:
    """`threads` is for all of it: torch's own pool would only take cores from the native one."""
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert resolved(checkpoint, kernels=path, threads=3).threads == 3
        assert torch.get_num_threads() == (1 if path == "native" else 3)
    finally:
        torch.set_num_threads(before)


def test_open_choices_are_closed_and_told(checkpoint: Path) -> None:
    config, executor = load_executor(EngineOptions(model=str(checkpoint), device="cpu"))
    executor.close()
    told = "\n".join(config.decisions)
    assert config.threads >= 1
    assert f"threads {config.threads}" in told
    assert f"dtype {config.dtype}" in told
    assert config.scheduler.max_num_batched_tokens == 512
    assert "max_num_batched_tokens 512" in told
    assert config.scheduler.max_model_len == 128
    assert "max_model_len 128: the checkpoint's" in told
    assert "KV memory" in told
    # The pool is no larger than what all sequences together can fill.
    assert config.scheduler.num_pages == 256 * 128 // 16
    assert f"KV pages {config.scheduler.num_pages}" in told
    assert config.architecture == "LlamaForCausalLM"
    assert config.vocab_size == 128
    assert config.eos_token_ids == (2,)
    assert config.model_dir == str(checkpoint)
    page_bytes = 2 * 2 * 2 * 16 * 16 * (2 if config.dtype == "bfloat16" else 4)
    assert config.kv_cache_bytes == (config.scheduler.num_pages + 1) * page_bytes


def test_given_choices_are_kept(checkpoint: Path) -> None:
    config = resolved(
        checkpoint,
        dtype="float32",
        page_size=4,
        max_num_seqs=3,
        max_num_batched_tokens=7,
        max_model_len=50,
        max_num_waiting=9,
        prefix_cache=False,
        async_scheduling=False,
    )
    assert config.decisions == ()
    assert config.dtype == "float32"
    scheduler = config.scheduler
    assert (scheduler.page_size, scheduler.max_num_seqs, scheduler.max_model_len) == (4, 3, 50)
    assert (scheduler.max_num_batched_tokens, scheduler.max_num_waiting) == (7, 9)
    assert not scheduler.prefix_cache
    assert config.kv_cache_bytes <= KV_BYTES
    assert config.kv_cache_bytes == KV_BYTES // (2 * 2 * 2 * 4 * 16 * 4) * (2 * 2 * 2 * 4 * 16 * 4)


@pytest.mark.parametrize("path", cpu_paths())
def test_a_dtype_that_the_machine_computes_slowly_becomes_float32(
    checkpoint: Path, path: str, tmp_path: Path
) -> None:
    config = resolved(checkpoint, kernels=path)
    is_fast = "bf16" in config.kernels
    assert config.dtype == ("bfloat16" if is_fast else "float32")
    assert config.exact == (path == "native")
    make(case("llama-gqa"), tmp_path, dtype=torch.float16)
    assert resolved(tmp_path, kernels=path).dtype == "float32"


def test_many_sequences_raise_the_default_of_batched_tokens(checkpoint: Path) -> None:
    assert resolved(checkpoint, max_num_seqs=700).scheduler.max_num_batched_tokens == 701


def test_the_length_is_cut_to_what_the_pool_holds(checkpoint: Path) -> None:
    config = resolved(checkpoint, dtype="float32", kv_cache_memory_bytes=3 * 8192)
    assert config.scheduler.num_pages == 2
    assert config.scheduler.max_model_len == 32
    assert "max_model_len 32: what the pool holds, of the checkpoint's 128" in config.decisions[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, ["device", "tpu"]),
        ({"device": "vulkan"}, ["device", "vulkan"]),
        ({"dtype": "int4"}, ["dtype", "int4", "bfloat16"]),
        ({"kernels": "magic"}, ["kernels", "magic", "native"]),
        ({"kernels": "triton"}, ["kernels", "triton"]),
        ({"threads": 0}, ["threads", "0"]),
        ({"page_size": 0}, ["page_size", "0"]),
        ({"max_num_batched_tokens": 0}, ["max_num_batched_tokens"]),
        ({"max_model_len": 129}, ["max_model_len", "129", "128"]),
        ({"max_model_len": 0}, ["max_model_len", "0"]),
        ({"kv_cache_memory_bytes": 100}, ["KV memory", "100"]),
        ({"kv_cache_memory_bytes": 20_000, "max_model_len": 128}, ["max_model_len", "128", "pool"]),
        ({"model": "/no/such/dir"}, ["/no/such/dir"]),
        ({"quantization": "int3"}, ["quantization", "int3", "int8"]),
        ({"kv_cache_dtype": "int4"}, ["kv_cache_dtype", "int4", "int8"]),
        (
            {"kv_cache_dtype": "float16", "dtype": "float32"},
            ["kv_cache_dtype", "float16", "float32"],
        ),
        ({"kv_cache_dtype": "fp8_e4m3"}, ["kv_cache_dtype", "cpu", "fp8_e4m3", "GPU"]),
    ],
)
def test_what_can_not_be_is_refused(
    checkpoint: Path, options: dict[str, Any], words: list[str]
) -> None:
    given = {"model": str(checkpoint), "device": "cpu", "threads": 1, **options}
    with pytest.raises(ConfigError) as error:
        load_executor(EngineOptions(**given))
    for word in words:
        assert word in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        resolved(checkpoint, device="cuda")


@pytest.mark.parametrize("seed", range(20))
def test_a_gpus_pages_leave_room_for_the_parts_of_attention_and_captured_steps(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """As many pages as fit with what the longest sequence that they hold takes, and no more."""
    rng = random.Random(seed)
    length = rng.choice([100, 3000, 10**6])
    model = msgspec.structs.replace(read_model_config(checkpoint), max_model_len=length)
    max_num_seqs = rng.choice([1, 40, 600])
    options = EngineOptions(
        model=str(checkpoint),
        max_num_seqs=max_num_seqs,
        max_model_len=rng.choice([None, 90]),
        gpu_memory_utilization=1.0,
        enforce_eager=rng.random() < 0.3,
    )
    spec = KVSpec(model.num_layers, model.num_kv_heads, model.head_dim, 16, "bfloat16")
    left = rng.randrange(2**30, 2**31)
    free = left + 1000 + _activation_bytes(model, "bfloat16", max_num_seqs, 2048)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))

    def parts(rows: int, num_pages: int) -> int:
        splits = -(-num_pages * 16 // 256)
        return rows * model.num_heads * splits * (model.head_dim + 2) * 4 * (splits > 1)

    def needed(num_pages: int) -> int:
        table = min(num_pages, -(-(options.max_model_len or length) // 16))
        padded = 64
        while padded < table:
            padded *= 2
        eager = parts(max(16, max_num_seqs), table)
        captured = parts({1: 16, 40: 48, 600: 512}[max_num_seqs], padded)
        kept = 0 if options.enforce_eager else graphs(padded)
        return num_pages * spec.page_bytes + eager + captured + kept

    def graphs(most_pages: int) -> int:
        """Of the 64 largest shapes: a table of int32 and hidden states in bfloat16 for each row."""
        most = {1: 1, 40: 48, 600: 512}[max_num_seqs]
        sizes = [n for n in (1, 2, 4, 8, *range(16, 513, 16)) if n <= most]
        widths = [64 << i for i in range(20) if 64 << i <= most_pages]
        rows = [n * (4 * width + 2 * model.hidden_size) for n in sizes for width in widths]
        return sum(each + GRAPH_BYTES for each in sorted(rows)[-64:])

    decisions: list[str] = []
    device = torch.device("cuda", 0)
    memory_bytes = _kv_memory_bytes(options, model, spec, device, "bfloat16", 1000, 2048, decisions)
    num_pages = memory_bytes // spec.page_bytes
    assert memory_bytes == num_pages * spec.page_bytes
    assert needed(num_pages) <= left < needed(num_pages + 1)
    assert "for parts of attention" in decisions[0]
    # Too little for one page is no memory, and not less.
    free = 5
    assert _kv_memory_bytes(options, model, spec, device, "bfloat16", 1000, 2048, decisions) == 0


def test_an_unsupported_architecture_lists_the_supported(checkpoint: Path, tmp_path: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    raw["architectures"] = ["LlavaForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"LlavaForConditionalGeneration.*LlamaForCausalLM"):
        resolved(tmp_path)


def test_the_numerics_identity_changes_with_what_changes_bits(
    checkpoint: Path, tmp_path: Path
) -> None:
    before = resolved(checkpoint, dtype="float32").numerics_identity
    assert len(before) == 32
    assert resolved(checkpoint, dtype="float32").numerics_identity == before
    assert resolved(checkpoint, dtype="bfloat16").numerics_identity != before
    assert resolved(checkpoint, dtype="float32", page_size=4).numerics_identity != before
    wide, narrow = (
        resolved(checkpoint, dtype=dtype, kv_cache_dtype="int8", kernels="torch").numerics_identity
        for dtype in ("float32", "bfloat16")
    )
    plain = resolved(checkpoint, dtype="float32", kernels="torch").numerics_identity
    assert len({wide, narrow, plain}) == 3
    quantized = resolved(checkpoint, dtype="float32", quantization="int8")
    assert quantized.quantization == "int8"
    assert quantized.numerics_identity != before
    make(case("llama-gqa"), tmp_path, dtype=torch.bfloat16, seed=1)
    assert resolved(tmp_path, dtype="float32").numerics_identity != before


def test_the_pool_holds_what_it_was_told_to(checkpoint: Path) -> None:
    plain = resolved(checkpoint, dtype="float32", kernels="torch")
    assert plain.kv_cache_dtype == "float32"
    same = resolved(checkpoint, dtype="float32", kv_cache_dtype="float32", kernels="torch")
    assert same.numerics_identity == plain.numerics_identity
    config = resolved(
        checkpoint,
        dtype="float32",
        kv_cache_dtype="int8",
        kernels="torch",
        kv_cache_memory_bytes=50 * 2 * 2 * 2 * 16 * (16 + 4),
    )
    assert (config.dtype, config.kv_cache_dtype) == ("float32", "int8")
    # 16 entries of a byte, and a scale of four, for each key and value.
    assert config.scheduler.num_pages == 49


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    assert available_bytes() > 0
    assert _cgroup_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\n")
    assert _cgroup_bytes(tmp_path) == 550


def test_a_pool_of_the_models_length_leaves_no_page_for_pins_and_says_so(
    checkpoint: Path,
) -> None:
    page_bytes = 2 * 2 * 2 * 16 * 16 * 2
    config = resolved(checkpoint, dtype="bfloat16", kv_cache_memory_bytes=7 * page_bytes)
    assert (config.scheduler.max_model_len, config.scheduler.max_pinned_pages) == (96, 0)
    assert "pins may hold 0 KV pages, not 1: one request of the model's length takes 6 of 6" in (
        "\n".join(config.decisions)
    )
    roomy = resolved(
        checkpoint, dtype="bfloat16", kv_cache_memory_bytes=7 * page_bytes, max_model_len=64
    )
    assert roomy.scheduler.max_pinned_pages == 1
