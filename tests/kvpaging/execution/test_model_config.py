"""config.json of both styles, the families' defaults, and refusals that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES, as_transformers_4

from kvpaging.base.errors import ConfigError, UnsupportedModel
from kvpaging.execution.model_config import DEFAULTS, parse_model_config, read_model_config
from kvpaging.execution.models.registry import FAMILIES, model_class

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def with_fields(**fields: Any) -> dict[str, Any]:
    return {**LLAMA, **fields}


def test_missing_fields_have_the_family_s_defaults() -> None:
    config = parse_model_config(LLAMA, {})
    assert config.num_kv_heads == 4
    assert config.head_dim == 16
    assert config.attention_scale == 0.25
    assert not config.tie_word_embeddings
    assert config.windows == (None, None)
    assert config.ropes[0].theta == 10_000
    assert config.dtype == "float32"
    assert config.eos_token_ids == ()

    gemma = parse_model_config({**LLAMA, "architectures": ["Gemma2ForCausalLM"]}, {})
    assert gemma.tie_word_embeddings
    assert gemma.head_dim == 256
    assert gemma.attention_soft_cap == 50
    assert gemma.logit_soft_cap == 30
    assert gemma.windows == (4096, None)

    gemma3 = parse_model_config(
        {**LLAMA, "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7}, {}
    )
    assert [gemma3.ropes[which].theta for which in gemma3.rope_of_layer] == [
        *[10_000.0] * 5,
        1_000_000.0,
        10_000.0,
    ]
    assert gemma3.windows == (*[4096] * 5, None, 4096)

    mistral = parse_model_config(
        {**LLAMA, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}, {}
    )
    assert mistral.windows == (4096, 4096)


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.old_style and case.model_type != "gemma3"], ids=str
)
def test_both_styles_say_the_same(case: Any) -> None:
    from checkpoints import SMALL
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    theirs = AutoConfig.for_model(case.model_type, **{**SMALL, **case.fields})
    name = MODEL_FOR_CAUSAL_LM_MAPPING[type(theirs)].__name__
    new = {**theirs.to_dict(), "architectures": [name], "dtype": "bfloat16"}
    new = json.loads(json.dumps(new))
    old = as_transformers_4(new)
    assert "rope_parameters" not in old
    parsed = parse_model_config(new, {})
    assert parsed.dtype == "bfloat16"
    if "full_attention" in new["rope_parameters"]:
        # The old style has one scaling, which is the full layers'.
        assert parse_model_config(old, {}).ropes == parsed.ropes
    else:
        assert parse_model_config(old, {}) == parsed


def test_the_generation_config_s_ends_win() -> None:
    raw = with_fields(eos_token_id=3)
    assert parse_model_config(raw, {}).eos_token_ids == (3,)
    assert parse_model_config(raw, {"eos_token_id": 7}).eos_token_ids == (7,)
    assert parse_model_config(raw, {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": None}, ["architectures", "LlamaForCausalLM"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"vocab_size": "many"}, ["vocab_size", "many"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "4"]),
        ({"hidden_size": 65}, ["hidden_size", "65", "num_attention_heads"]),
        ({"head_dim": 12}, ["head_dim", "12", "multiple of 8"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "yes"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["torch_dtype", "float8_e4m3fn", "bfloat16"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        ({"rope_scaling": {"type": "spiral"}}, ["spiral", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": "linear"}, ["rope_scaling", "object"]),
        ({"partial_rotary_factor": 0.1}, ["partial_rotary_factor", "0.1"]),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            ["short_factor", "8"],
        ),
        ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_model_config(with_fields(**fields), {})
    for word in words:
        assert word in str(error.value)


def test_an_unsupported_architecture_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModel) as error:
        parse_model_config(with_fields(architectures=["MambaForCausalLM"]), {})
    assert "MambaForCausalLM" in str(error.value)
    for name in FAMILIES:
        assert name in str(error.value)


def test_every_architecture_that_is_read_has_a_class() -> None:
    assert set(DEFAULTS) == set(FAMILIES)
    for name in FAMILIES:
        fields = {"num_key_value_heads": 2, "moe_intermediate_size": 8, "head_dim": 16}
        raw = with_fields(architectures=[name], **fields)
        config = parse_model_config({**raw, "text_config": raw}, {})
        assert model_class(config).__name__ in (name, "LlamaForCausalLM")


def test_stretched_lengths() -> None:
    def longest(**scaling: Any) -> int:
        return parse_model_config(with_fields(rope_scaling=scaling), {}).max_model_len

    assert parse_model_config(LLAMA, {}).max_model_len == 512
    assert longest(type="linear", factor=4.0) == 2048
    assert longest(type="yarn", factor=4.0) == 2048
    assert longest(type="yarn", factor=4.0, original_max_position_embeddings=128) == 512
    assert longest(type="llama3", factor=8.0, original_max_position_embeddings=64) == 512


def test_a_model_that_also_sees_gives_its_text_model() -> None:
    # As the hub has Gemma 3 4B: little is said, and the length includes the scaling.
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vision_config": {},
    }
    config = parse_model_config(raw, {})
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_model_len) == (262_208, 131_072)
    assert (config.dtype, config.eos_token_ids) == ("bfloat16", (1, 106))
    assert config.tie_word_embeddings
    assert config.windows[:6] == (1024,) * 5 + (None,)
    assert [rope.kind for rope in config.ropes] == ["linear", "default"]
    with pytest.raises(ConfigError, match="text_config"):
        parse_model_config({**raw, "text_config": None}, {})


def test_files_that_are_absent_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="object"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5]}')
    assert read_model_config(tmp_path).eos_token_ids == (5,)
