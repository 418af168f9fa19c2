"""Measures an exported demo model and writes its model card.

Computes, from the checkpoint directory alone, the bits per byte on the held-out files of the
standard library (the running Python must be the version that the model was trained on), compares
with ``xz -9`` on the same files put together, and prints continuations of a few prompts.

    python examples/evaluate_demo_model.py --model kvpaging/demo_model --write-card

Every file stands alone: <|endoftext|>, then its tokens. Files longer than the context are read in
windows that overlap by half, so that each later token sees at least half a context. Only the
file's own tokens are counted, against the file's bytes.

It runs the training script's plain forward pass, without any cache, and so knows nothing of
kvpaging.
"""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_corpus import Document, collect_documents
from safetensors.torch import load_file
from tokenizers import Tokenizer
from train_demo_model import (
    TENSOR_NAMES,
    TURN_START,
    ModelConfig,
    Weights,
    hidden_states,
    render_chat,
    token_losses,
)

logger = logging.getLogger("evaluate_demo_model")

PROMPTS = (
    "def read_lines(path):",
    "import os\n",
    "class Stack:\n",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "for name in sorted(os.listdir(directory)):\n",
)
CHAT_PROMPTS = (
    "Write a Python function that returns the lines of a file.",
    "Write a function `is_prime`. Return True if n is a prime number.",
    "Hello!",
)
CARD_PROMPTS = (PROMPTS[0], PROMPTS[2])
CARD_QUESTIONS = CHAT_PROMPTS[:2]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An exported demo model, loaded."""

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    training: dict[str, Any]
    end_tokens: frozenset[int]


@dataclass(frozen=True, slots=True)
class DocumentBits:
    """What the model needs for one file."""

    num_tokens: int
    bits: float


@dataclass(frozen=True, slots=True)
class HeldOutFigures:
    """What was measured on a set of files."""

    num_files: int
    num_bytes: int
    num_tokens: int
    model_bits: float
    xz_bits: int

    @property
    def model_bits_per_byte(self) -> float:
        """Bits that the model needs for a byte."""
        return self.model_bits / self.num_bytes

    @property
    def xz_bits_per_byte(self) -> float:
        """Bits that ``xz -9`` needs for a byte."""
        return self.xz_bits / self.num_bytes


def load_checkpoint(folder: Path) -> Checkpoint:
    """Loads a checkpoint directory that ``train_demo_model.py`` wrote."""
    training = json.loads((folder / "training.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    known = {each.name for each in fields(ModelConfig)}
    config = ModelConfig(**{k: v for k, v in training["model"].items() if k in known})
    if config.to_hugging_face() != json.loads((folder / "config.json").read_text()):
        raise ValueError(f"{folder}: config.json and training.json disagree")
    tensors = load_file(folder / "model.safetensors")
    weights = {
        "embed": tensors["model.embed_tokens.weight"],
        "final_norm": tensors["model.norm.weight"],
    }
    for theirs, ours in TENSOR_NAMES.items():
        layers = [tensors[f"model.layers.{i}.{theirs}.weight"] for i in range(config.num_layers)]
        weights[ours] = torch.stack(layers)
    return Checkpoint(
        config=config,
        weights=weights,
        tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
        training=training,
        end_tokens=frozenset(generation["eos_token_id"]),
    )


def document_bits(model: Checkpoint, tokens: Sequence[int]) -> float:
    """Returns the bits of all ``tokens`` but the first, which is <|endoftext|>."""
    context = model.config.max_position
    nats, counted, start = 0.0, 1, 0
    while counted < len(tokens):
        window = tokens[start : start + context + 1]
        losses = token_losses(model.weights, model.config, torch.tensor([window]))
        fresh = losses[counted - start - 1 :]
        nats += fresh.double().sum().item()
        counted += len(fresh)
        start += context // 2
    return nats / math.log(2)


def bits_by_path(model: Checkpoint, documents: Sequence[Document]) -> dict[str, DocumentBits]:
    """Measures the model on each document by itself."""
    measured = {}
    for document in documents:
        tokens = model.tokenizer.encode(document.text).ids
        if model.tokenizer.decode(tokens) != document.text:
            raise ValueError(f"{document.path}: the tokenizer does not give the text back")
        with torch.inference_mode():
            bits = document_bits(model, tokens)
        measured[document.path] = DocumentBits(num_tokens=len(tokens) - 1, bits=bits)
    return measured


def summarize(documents: Sequence[Document], measured: dict[str, DocumentBits]) -> HeldOutFigures:
    """Adds up ``documents``, in the order of their paths, and packs them with ``xz -9``."""
    together = b"".join(each.text.encode() for each in documents)
    return HeldOutFigures(
        num_files=len(documents),
        num_bytes=len(together),
        num_tokens=sum(measured[each.path].num_tokens for each in documents),
        model_bits=sum(measured[each.path].bits for each in documents),
        xz_bits=8 * len(lzma.compress(together, preset=9)),
    )


def generate(
    model: Checkpoint, prompt: str, *, max_tokens: int, temperature: float, seed: int = 1
) -> str:
    """Returns the continuation of ``prompt``; greedy if ``temperature`` is 0."""
    rng = np.random.default_rng(seed)
    tokens = model.tokenizer.encode(prompt).ids
    num_prompt_tokens = len(tokens)
    with torch.inference_mode():
        for _ in range(max_tokens):
            hidden = hidden_states(model.weights, model.config, torch.tensor([tokens]))
            logits = (hidden[0, -1] @ model.weights["embed"].T).double()
            if temperature:
                chances = torch.softmax(logits / temperature, dim=-1).numpy()
                token = int(rng.choice(len(chances), p=chances / chances.sum()))
            else:
                token = int(logits.argmax())
            if token in model.end_tokens:
                break
            tokens.append(token)
    return model.tokenizer.decode(tokens[num_prompt_tokens:])


def chat_prompt(question: str) -> str:
    """Renders one user turn and the start of the answer."""
    return render_chat([{"role": "user", "content": question}]) + f"{TURN_START}assistant\n"


def show_samples(model: Checkpoint) -> None:
    """Prints continuations, greedy and at temperature 0.7."""
    prompts = [*PROMPTS, *(chat_prompt(each) for each in CHAT_PROMPTS)]
    for prompt in prompts:
        for temperature in (0.0, 0.7):
            text = generate(model, prompt, max_tokens=120, temperature=temperature)
            print(f"---- temperature {temperature}\n{prompt}\033[1m{text}\033[0m")


CARD = """\
---
language: en
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
tags: [llama, demo]
---

# The kvpaging demo model

A Llama of {parameters:,} parameters that the kvpaging project trained itself, from nothing, so
that a fresh installation has something to serve. It writes text that looks like Python. It is
there for demonstrations, tests and measurements of the server; **it does not know how to program
and its answers are not to be relied on.**

## Architecture

`LlamaForCausalLM`, bfloat16: {num_layers} layers, hidden size {hidden_size}, {num_heads} query \
heads and {num_kv_heads} key/value heads
of {head_dim}, SwiGLU of {intermediate_size}, RMSNorm, RoPE (theta {rope_theta:,.0f}), tied \
embeddings, context {max_position:,}.
Byte-level BPE tokenizer of its own with {vocab_size:,} tokens, three of them special
(`<|endoftext|>` before each text and at its end, `<|im_start|>` and `<|im_end|>` around chat
turns); any string survives encoding and decoding. A ChatML template is in
`tokenizer_config.json`.

| file | bytes |
|---|---:|
{file_sizes}
| together | {total_size:,} |

## Data

The standard library of CPython {python} as installed: {training_files:,} files, \
{library_megabytes:.1f} MB of library sources
and documents (the `.py` files, the few `.rst` and `.txt` files, and the language reference in
`pydoc_data.topics`), each taken twice, and {tests_megabytes:.1f} MB of its tests, taken once. \
Exact duplicates,
test data, files that are not UTF-8 and the character tables made by `gencodec.py` are left out.
To this come {chat_conversations:,} short conversations ({chat_megabytes:.1f} MB) made by script \
from the docstrings and bodies of
the library's functions, and a few greetings written for the purpose. The library is the
copyright of the Python Software Foundation and others and used under the
[PSF License Agreement](https://docs.python.org/3/license.html), which allows derivative works;
this model is passed on under the same terms.

Held out, never trained on, neither by the model nor by the tokenizer: the {num_held_out} files \
({held_out_bytes:,} bytes)
for which the first four bytes of the SHA-256 of the path relative to the standard library, as a
big-endian number, leave a remainder below 3 when divided by 100. `training.json` lists them.
{overlap:.0%} of their bytes stand in lines of 20 characters or more that also occur somewhere in
the training text (licence headers, common idioms, and code that was copied within the library).

## Training

{tokens_seen:,} tokens ({passes:.1f} passes over {stream_tokens:,}) in {steps:,} steps of \
{tokens_per_step:,}, {wall_minutes:.0f} minutes on {threads} CPU cores
that were shared with other work, bfloat16 with float32 master weights. Muon for the matrices,
Adam for embedding and norms; constant learning rate, then a straight line down. Tokens in a
window, step by step in turn:
{phases}.

## Figures

Bits per byte on the held-out files, fewer is better:

| files | bytes | this model | `xz -9` |
|---|---:|---:|---:|
{figure_rows}

Each file alone after one `<|endoftext|>`; files longer than the context in windows of
{max_position:,} tokens that overlap by half. `xz -9` had the same files put together in the order
of their paths. (xz comes without training and is general; the comparison says only that the model
has learned more of Python than repetition.) On the held-out files a token is
{bytes_per_token:.2f} bytes.

## Samples

{samples}

## To make it again

    pip install 'torch>=2.11' numpy safetensors tokenizers
    python examples/train_demo_model.py --out DIR --work SCRATCH --steps {steps} --seed {seed}
    python examples/evaluate_demo_model.py --model DIR --write-card

with CPython {python} (another version has other sources, so other figures). The run behind this
file was bounded by time (`--minutes`), so its learning rate and window lengths followed the
clock on a busy machine, and it was stopped and resumed three times; with `--steps` they follow
the steps. Expect a result that is close, not the same bits.

## Limits

Imitates the style of the standard library and little else; invents names, loses the thread
after some lines, repeats itself when decoded greedily, answers questions about nothing but
Python functions, and those mostly wrongly. It may recite passages of the standard library.
English only. No safety training.
"""


def line_overlap(held_out: Sequence[Document], training: Sequence[Document]) -> float:
    """Returns the share of held-out bytes in long lines that the training text also has."""
    known = {line.strip() for each in training for line in each.text.splitlines()}
    total = sum(len(each.text.encode()) for each in held_out)
    shared = sum(
        len(line.encode()) + 1
        for each in held_out
        for line in each.text.splitlines()
        if len(line.strip()) >= 20 and line.strip() in known
    )
    return shared / total


def phases_text(phases: Sequence[tuple[float, Sequence[int]]]) -> str:
    """Renders the window lengths as part of a sentence."""
    parts = [
        f"{', '.join(f'{length:,}' for length in lengths)} from {start:.0%} of the run"
        for start, lengths in phases
    ]
    return "; ".join(parts)


def write_card(
    folder: Path,
    model: Checkpoint,
    figures: dict[str, HeldOutFigures],
    overlap: float,
) -> None:
    """Writes ``README.md`` beside the weights, from measured figures only."""
    training, corpus = model.training, model.training["corpus"]
    sizes = {
        path.name: path.stat().st_size
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != "README.md" and not path.name.startswith(".")
    }
    samples = [
        f"{how}, prompt `{prompt.strip()}`:\n\n```python\n"
        f"{prompt}{generate(model, prompt, max_tokens=100, temperature=temperature)}\n```"
        for prompt in CARD_PROMPTS
        for how, temperature in (("Greedy", 0.0), ("Temperature 0.7, seed 1", 0.7))
    ]
    for question in CARD_QUESTIONS:
        answer = generate(model, chat_prompt(question), max_tokens=200, temperature=0.0)
        is_cut_off = answer.count("```") % 2 == 1
        samples.append(f"Chat, greedy: *{question}*\n\n{answer}" + "\n```" * is_cut_off)
    rows = [
        f"| {name} ({each.num_files}) | {each.num_bytes:,} | "
        f"{each.model_bits_per_byte:.3f} | {each.xz_bits_per_byte:.3f} |"
        for name, each in figures.items()
    ]
    everything = next(iter(figures.values()))
    card = CARD.format(
        **training["model"],
        parameters=training["parameters"],
        seed=training["seed"],
        steps=training["steps"],
        tokens_seen=training["tokens_seen"],
        tokens_per_step=training["tokens_seen"] // training["steps"],
        wall_minutes=training["wall_minutes"],
        threads=training["threads"],
        python=corpus["python"],
        training_files=corpus["training_files"],
        library_megabytes=corpus["training_bytes_library"] / 1e6,
        tests_megabytes=corpus["training_bytes_tests"] / 1e6,
        chat_conversations=corpus["chat_conversations"],
        chat_megabytes=corpus["chat_bytes"] / 1e6,
        stream_tokens=corpus["stream_tokens"],
        passes=training["tokens_seen"] / corpus["stream_tokens"],
        num_held_out=everything.num_files,
        held_out_bytes=everything.num_bytes,
        bytes_per_token=everything.num_bytes / everything.num_tokens,
        overlap=overlap,
        phases=phases_text(training["window_phases"]),
        file_sizes="\n".join(f"| `{name}` | {size:,} |" for name, size in sizes.items()),
        total_size=sum(sizes.values()),
        figure_rows="\n".join(rows),
        samples="\n\n".join(samples),
    )
    (folder / "README.md").write_text(card)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure kvpaging's demo model.")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--write-card", action="store_true", help="write README.md into it")
    parser.add_argument("--samples", action="store_true", help="print continuations")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    return parser.parse_args()


def main() -> None:
    """Measures, and does what else was asked for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = load_checkpoint(arguments.model)
    documents = collect_documents()
    held_out = [each for each in documents if each.is_held_out]
    training = [each for each in documents if not each.is_held_out]
    if [each.path for each in held_out] != model.training["corpus"]["held_out_files"]:
        logger.warning("this Python's held-out files are not those of the training run")
    measured = bits_by_path(model, held_out)
    groups = {
        "all held-out files": held_out,
        "of these, library": [each for each in held_out if not each.is_test],
        "of these, tests": [each for each in held_out if each.is_test],
    }
    figures = {name: summarize(group, measured) for name, group in groups.items()}
    for name, each in figures.items():
        logger.info(
            "%s: %d files, %d bytes, %d tokens; model %.4f, xz -9 %.4f bits per byte",
            name,
            each.num_files,
            each.num_bytes,
            each.num_tokens,
            each.model_bits_per_byte,
            each.xz_bits_per_byte,
        )
    if arguments.samples:
        show_samples(model)
    if arguments.write_card:
        write_card(arguments.model, model, figures, line_overlap(held_out, training))


if __name__ == "__main__":
    main()
