"""A checkpoint's tensors arrive whole, once, in the right dtype; what doesn't fit is named."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import ORIGINAL_LENGTH, case, make
from safetensors.torch import load_file, save_file

from kernels.reference import TorchOps
from kvpaging.base.errors import ConfigError
from kvpaging.execution.model_config import read_model_config
from kvpaging.execution.models.layers import CausalLM
from kvpaging.execution.models.registry import model_class
from kvpaging.execution.safetensors_file import SafetensorsFile
from kvpaging.execution.weights import Checkpoint, Parameters

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def load(
    directory: Path, dtype: torch.dtype = torch.float32, on_progress: object = None
) -> tuple[CausalLM, bytes]:
    config = read_model_config(directory)
    parameters = Parameters(Checkpoint(directory), TorchOps(CPU), CPU, dtype, on_progress)
    model = model_class(config)(config, parameters, ORIGINAL_LENGTH)
    return model, parameters.finish(model.ignored_tensors())


def tensors_of(model: object, found: Tensors | None = None, path: str = "") -> Tensors:
    """Every tensor that a model holds, by where it stands."""
    found = {} if found is None else found
    if isinstance(model, torch.Tensor):
        found[path] = model
    elif isinstance(model, list):
        for index, item in enumerate(model):
            tensors_of(item, found, f"{path}[{index}]")
    elif type(model).__module__.startswith(("kvpaging.execution.models", "kernels.reference")):
        names = getattr(model, "__dict__", None) or type(model).__slots__
        for name in names:
            tensors_of(getattr(model, name), found, f"{path}.{name}")
    return found


def change(directory: Path, edit: Callable[[Tensors], object]) -> None:
    """Rewrite a single-file checkpoint."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_shards_hold_what_a_single_file_holds(tmp_path: Path) -> None:
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    make(case("llama-mqa-biases"), single)
    make(case("llama-mqa-biases"), sharded, max_shard_size="50KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    one, one_fingerprint = load(single)
    many, many_fingerprint = load(sharded)
    expected = tensors_of(one)
    found = tensors_of(many)
    assert len(expected) > 10
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert one_fingerprint == many_fingerprint


def test_links_as_the_hub_s_cache_has_them(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert load(snapshot)[1] == load(tmp_path / "blobs")[1]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_becomes_the_one_that_computes(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    reference = make(case("llama-gqa"), tmp_path, dtype=stored)
    model, _ = load(tmp_path, wanted)
    tensors = tensors_of(model)
    name = ".model.layers.0.self_attn"
    attention = reference.model.layers[0].self_attn  # type: ignore[union-attr]
    fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    weight = tensors["._layers[0]._attention._qkv.weight"]
    assert weight.dtype == wanted, name
    assert torch.equal(weight, fused.to(wanted))


def test_a_different_weight_gives_a_different_fingerprint(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path)
    before = load(tmp_path)[1]

    def nudge(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1

    change(tmp_path, nudge)
    assert load(tmp_path)[1] != before


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path)
    heard: list[tuple[str, int, int]] = []
    load(tmp_path, on_progress=lambda *report: heard.append(report))
    done = [done for _, done, _ in heard]
    assert done == sorted(done)
    assert heard[-1] == ("loading weights", done[-1], done[-1])
    assert {stage for stage, _, _ in heard} == {"loading weights"}


def test_a_parameter_is_asked_for_once(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path)
    parameters = Parameters(Checkpoint(tmp_path), TorchOps(CPU), CPU, torch.float32)
    parameters.at("model.").vector("norm.weight", 64)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight twice"):
        parameters.vector("model.norm.weight", 64)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path)
    change(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_a_tensor_that_nobody_asked_for_is_named(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path)

    def add(tensors: Tensors) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(2)

    change(tmp_path, add)
    with pytest.raises(ConfigError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path)

    def cut(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    change(tmp_path, cut)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \[63\].*\[64\]"):
        load(tmp_path)


def test_known_leftovers_are_ignored(tmp_path: Path) -> None:
    make(case("llama-mha-tied-old"), tmp_path)

    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    change(tmp_path, add)
    load(tmp_path)


def test_an_untied_head_is_not_a_leftover(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path)
    change(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        load(tmp_path)


def test_quantized_numbers_are_refused(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path)

    def quantize(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    change(tmp_path, quantize)
    with pytest.raises(ConfigError, match=r"down_proj\.weight is of type I8.*not supported"):
        load(tmp_path)


def test_pickled_weights_are_refused_with_a_remedy(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="save_pretrained"):
        Checkpoint(tmp_path)


def test_a_directory_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)


def test_an_absent_shard_is_named(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path, max_shard_size="50KB")
    shard = max(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ConfigError, match=shard.name):
        Checkpoint(tmp_path)


def test_an_index_that_names_a_path_is_refused(tmp_path: Path) -> None:
    make(case("llama-gqa"), tmp_path)
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="plain file name"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"1234", "too short"),
        (struct.pack("<Q", 1000) + b"{}", "cut off"),
        (struct.pack("<Q", 2**63) + b"{}", "cut off"),
        (struct.pack("<Q", 2) + b"[]", "malformed"),
        (struct.pack("<Q", 7) + b'{"a":1}', "malformed"),
    ],
)
def test_a_broken_file_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("offsets", "words"), [((0, 16), "beyond"), ((-4, 0), "beyond"), ((8, 4), "beyond")]
)
def test_a_tensor_outside_its_file_is_refused(
    offsets: tuple[int, int], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": list(offsets)}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ConfigError, match=words):
        SafetensorsFile(path)


def test_a_tensor_whose_bytes_do_not_make_its_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ConfigError, match="a of 4 numbers has 8 bytes"):
        SafetensorsFile(path).tensor("a")


def test_the_file_reader_agrees_with_the_library(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "odd": torch.arange(7, dtype=torch.float16),
        "matrix": torch.randn(300, 517),
        "empty": torch.empty(0, 3),
        "bf16": torch.randn(5, 3).bfloat16(),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(file.tensor(name), tensor)
        file.drop(name)
        assert torch.equal(file.tensor(name), tensor)  # read again
