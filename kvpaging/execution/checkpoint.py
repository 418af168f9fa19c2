"""Where a checkpoint lies: a directory as given, or a hub id through Hugging Face's cache.

Needs no torch, since the API process asks too (for the tokenizer). Knows nothing of what the files
hold.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from kvpaging.base.errors import ConfigError

PATTERNS: Final = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
)
"""What is fetched of a hub repository: weights, configuration, tokenizer, chat template."""

UNWANTED: Final = ("original/*", "consolidated*", "*.index.json.bak", "onnx/*", "runs/*")
"""Second copies of the weights in formats that nothing here reads."""


def resolve_checkpoint(model: str) -> Path:
    """The directory of `model`, a path or a hub id; fetched where it isn't cached.

    A hub id that is cached works without a network. Raises `ConfigError` when there is neither a
    directory nor such a repository.
    """
    if not model:
        raise ConfigError("model: is empty; give a checkpoint directory or a hub id")
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ConfigError(f"model: {model!r} is a file; give the checkpoint's directory")
    if not _may_be_hub_id(model):
        raise ConfigError(f"model: there is no directory {model!r}")
    return _from_hub(model)


def _may_be_hub_id(model: str) -> bool:
    parts = model.split("/")
    return (
        len(parts) in (1, 2)
        and all(part and not part.startswith((".", "~", "-")) for part in parts)
        and os.sep not in model.replace("/", "")
        and all(character.isalnum() or character in "-_./" for character in model)
    )


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    def fetch(*, local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                model,
                allow_patterns=list(PATTERNS),
                ignore_patterns=list(UNWANTED),
                local_files_only=local_files_only,
            )
        )

    try:
        return fetch(local_files_only=False)
    except GatedRepoError as error:
        raise ConfigError(
            f"model: {model!r} is gated on the hub; accept its licence there and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"model: there is neither a directory nor a hub repository {model!r} "
            "(a private one needs HF_TOKEN)"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        # No network, or the hub is down: what is cached still serves.
        try:
            return fetch(local_files_only=True)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
            raise ConfigError(
                f"model: {model!r} is not a directory, is not in the hub's cache, and the hub "
                f"can't be reached ({type(error).__name__})"
            ) from error
