"""Write a checkpoint of a real model's shape with random weights: what speed is measured on.

    python benchmarks/make_checkpoint.py DIRECTORY [--shape qwen3-0.6b] [--vocab 32000]

The weights are normal and small enough that logits stay finite; the tokenizer has one word a token
(`t0 t1 t2 ...`), so that prompts of any length can be written as text too. Needs the extra `test`
(safetensors). Knows shapes, and nothing about how they are computed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
}
COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}


def tensors(config: dict[str, Any], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight by its name in the checkpoint, in bfloat16."""
    random = torch.Generator().manual_seed(seed)
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size

    def normal(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random) * columns**-0.5).bfloat16()

    def ones(count: int) -> torch.Tensor:
        return torch.ones(count, dtype=torch.bfloat16)

    yield "model.embed_tokens.weight", normal(config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}."
        yield at + "input_layernorm.weight", ones(hidden)
        yield at + "self_attn.q_proj.weight", normal(queries, hidden)
        yield at + "self_attn.k_proj.weight", normal(keys, hidden)
        yield at + "self_attn.v_proj.weight", normal(keys, hidden)
        yield at + "self_attn.o_proj.weight", normal(hidden, queries)
        if config["model_type"] == "qwen3":
            yield at + "self_attn.q_norm.weight", ones(size)
            yield at + "self_attn.k_norm.weight", ones(size)
        yield at + "post_attention_layernorm.weight", ones(hidden)
        yield at + "mlp.gate_proj.weight", normal(inner, hidden)
        yield at + "mlp.up_proj.weight", normal(inner, hidden)
        yield at + "mlp.down_proj.weight", normal(hidden, inner)
    yield "model.norm.weight", ones(hidden)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", normal(config["vocab_size"], hidden)


def write(directory: Path, shape: str, vocab_size: int, seed: int) -> int:
    """Write config, weights and tokenizer; returns the bytes of the weights."""
    config = {**COMMON, **SHAPES[shape], "vocab_size": vocab_size}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    weights = dict(tensors(config, seed))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    words = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, vocab_size))]
    tokenizer = Tokenizer(
        models.WordLevel(dict(zip(words, range(vocab_size), strict=True)), "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return sum(weight.numel() * weight.itemsize for weight in weights.values())


def main() -> None:
    """Read the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    num_bytes = write(args.directory, args.shape, args.vocab, args.seed)
    print(f"{args.directory}: {args.shape}, {num_bytes / 1e6:,.0f} MB of weights")


if __name__ == "__main__":
    main()
