"""Small tokenizers of each kind, made in milliseconds."""

from __future__ import annotations

from functools import cache

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from server.text import ChatTemplate, Text, Tokenizer

CORPUS = [
    "def read_lines(path): return open(path).readlines()",
    "The quick brown fox jumps over the lazy dog. The dog sleeps.",
    "naïve café, Ünïcödé, 日本語のテキスト, emoji 😀😁🎉 and ‰",
]
SPECIAL = ["<eos>", "<bos>"]
EOS, BOS = 0, 1

CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_level(*, adds_bos: bool = False, vocab_size: int = 400) -> tokenizers.Tokenizer:
    """Like GPT-2, Llama 3 and Qwen: tokens are bytes."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """Like Llama 2: spaces are U+2581, what the vocabulary lacks is written as byte tokens."""
    pieces = ["▁", "▁the", "▁dog", "the", "dog", "s", "a", "b", "é", ".", "▁a", "\n"]
    tokens = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [("▁", "a")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(SPECIAL)
    return backend


def metaspace() -> tokenizers.Tokenizer:
    """A unigram-style vocabulary with the `Metaspace` decoder, as T5 and some Gemmas have."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=200, special_tokens=[*SPECIAL, "<unk>"], show_progress=False
        ),
    )
    return backend


@cache
def text() -> Text:
    """A byte-level tokenizer with a chat template; no token goes before a prompt."""
    special_tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return Text(Tokenizer(byte_level()), ChatTemplate(CHAT, special_tokens))
