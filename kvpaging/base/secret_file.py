"""The secret that servers share which share pages, in a file.

Knows nothing of what it is used for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kvpaging.base.errors import ConfigError

MIN_SECRET_BYTES: Final = 16


def read_secret(path: Path) -> bytes:
    """The file's bytes without white space around them. Raises ConfigError."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"the secret in {path} can't be read: {error.strerror}") from None
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"the secret in {path} has {len(secret)} bytes; give at least {MIN_SECRET_BYTES}: "
            f"head -c 32 /dev/urandom > {path}"
        )
    return secret
