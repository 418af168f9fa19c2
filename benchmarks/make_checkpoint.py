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
from model_shapes import COMMON, SHAPES, parameters
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers


def tensors(config: dict[str, Any], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight by its name in the checkpoint, in bfloat16."""
    random = torch.Generator().manual_seed(seed)
    for name, shape in parameters(config):
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        else:
            yield name, (torch.randn(shape, generator=random) * shape[1] ** -0.5).bfloat16()


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
