"""Text of one checkpoint: tokenizer, chat template, whole characters, stop strings.

The only room that knows `tokenizers` and `jinja2`. Knows no HTTP and no engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvpaging.base.errors import ConfigError
from server.text.chat_template import ChatTemplate
from server.text.detokenizer import Detokenizer, detokenizer_for
from server.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "Text", "Tokenizer"]


@dataclass(frozen=True, slots=True)
class Text:
    """What turns text into a checkpoint's token ids and back."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None

    @classmethod
    def load(cls, model_dir: str | Path) -> Self:
        """Read a checkpoint directory. Raises `ConfigError` if its tokenizer can't be used."""
        directory = Path(model_dir)
        config = _read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_json(directory / "special_tokens_map.json"))
        special_tokens |= _special_tokens(config)
        tokenizer = Tokenizer.load(
            directory / "tokenizer.json",
            bos_token=special_tokens.get("bos_token"),
            add_bos_token=config.get("add_bos_token"),
        )
        return cls(tokenizer, ChatTemplate.load(directory, config, special_tokens))

    def detokenizer(self) -> Detokenizer:
        """Give a fresh one, for one output."""
        return detokenizer_for(self.tokenizer)


def _read_json(path: Path) -> dict[str, Any]:
    """Give the object in the file, or an empty one if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Give the named special tokens (`bos_token`, ...), written as text or as an added token."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens
