"""Frequencies against transformers', and the table against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpaging.execution.model_config import parse_model_config
from kvpaging.execution.rope import cos_sin_table, inverse_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [1.5 + 0.7 * i for i in range(16)],
}

# (rope fields, max_position_embeddings, max_model_len)
SCALINGS: list[tuple[dict[str, Any], int, int]] = [
    ({"rope_type": "default"}, 512, 512),
    ({"rope_type": "linear", "factor": 4.0}, 512, 2048),
    ({"rope_type": "dynamic", "factor": 4.0}, 512, 512),
    ({"rope_type": "dynamic", "factor": 4.0}, 512, 1536),
    ({"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64}, 512, 512),
    ({"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 8192}, 131_072, 512),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512, 512),
    ({"rope_type": "yarn", "factor": 16.0, "attention_factor": 1.25}, 512, 512),
    ({"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.4}, 512, 512),
    ({"rope_type": "yarn", "factor": 8.0, "beta_fast": 20, "beta_slow": 2}, 4096, 512),
    ({"rope_type": "yarn", "factor": 8.0, "truncate": False}, 4096, 512),
    ({"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 256}, 1024, 256),
    ({"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 256}, 1024, 257),
    ({"rope_type": "longrope", **LONGROPE, "attention_factor": 1.1, "factor": 2.0}, 1024, 1024),
]


def raw_config(rope: dict[str, Any], max_positions: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": max_positions,
        "rope_parameters": {"rope_theta": 500_000.0, **rope},
    }


@pytest.mark.parametrize(("rope", "max_positions", "length"), SCALINGS)
def test_frequencies_are_those_of_transformers(
    rope: dict[str, Any], max_positions: int, length: int
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = raw_config(rope, max_positions)
    config = parse_model_config(raw, {}).ropes[0]
    frequencies, factor = inverse_frequencies(config, length)
    assert frequencies.dtype == torch.float64

    theirs = LlamaConfig(**{**raw, "rope_parameters": dict(raw["rope_parameters"])})
    if rope["rope_type"] == "default":
        expected, expected_factor = 500_000.0 ** -(torch.arange(0, 32, 2) / 32), 1.0
    else:
        function = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        expected, expected_factor = function(theirs, torch.device("cpu"), seq_len=length)
    torch.testing.assert_close(frequencies, expected.double(), rtol=2e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_a_table_holds_cosines_then_sines_of_every_position() -> None:
    raw = raw_config({"rope_type": "yarn", "factor": 4.0}, 512)
    config = parse_model_config(raw, {}).ropes[0]
    frequencies, factor = inverse_frequencies(config, 9000)
    table = cos_sin_table(config, 9000, torch.device("cpu"))
    assert table.shape == (9000, 32)
    assert table.dtype == torch.float32
    assert factor > 1
    for position in (0, 1, 8191, 8192, 8999):  # both sides of a chunk's edge
        angles = position * frequencies
        expected = torch.cat((angles.cos(), angles.sin())) * factor
        assert torch.equal(table[position], expected.float())


def test_partial_rotation_turns_the_first_numbers_of_a_head() -> None:
    raw = {**raw_config({"rope_type": "default"}, 512), "partial_rotary_factor": 0.5}
    config = parse_model_config(raw, {}).ropes[0]
    frequencies, _ = inverse_frequencies(config, 512)
    assert config.rotary_dim == 16
    expected = 500_000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    torch.testing.assert_close(frequencies, expected)


def test_the_longest_admitted_text_decides_for_all() -> None:
    rope = {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 256}
    config = parse_model_config(raw_config(rope, 1024), {}).ropes[0]
    short, long = inverse_frequencies(config, 256)[0], inverse_frequencies(config, 1024)[0]
    factors = torch.tensor(LONGROPE["long_factor"], dtype=torch.float64)
    torch.testing.assert_close(
        short / long, factors / torch.tensor(LONGROPE["short_factor"], dtype=torch.float64)
    )
