"""Who sends a request: API keys, the tenants that they stand for, and who operates the server.

A key is known by its hash alone, with a secret of this process: neither memory nor the time of a
look-up tells a key. Knows nothing of pages, and of HTTP only what a key may look like.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from kvpaging.base.clock import Clock, monotonic
from kvpaging.base.errors import ConfigError

ANONYMOUS_TENANT: Final = "anonymous"
MAX_KEY_CHARS: Final = 1024
MAX_FILE_BYTES: Final = 16 * 1024 * 1024
LOOK_EVERY_S: Final = 1.0
"""How often the file of keys is looked at, while requests come."""

_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FIELDS: Final = ("tenant", "key", "sha256", "role", "budget", "comment")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_PROCESS_SECRET: Final = secrets.token_bytes(32)

_logger: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a request comes from."""

    tenant: str
    is_operator: bool
    """May see what concerns all tenants, where no operator key is set: see `operator_door`."""


ANONYMOUS: Final = Identity(ANONYMOUS_TENANT, is_operator=True)
"""Everybody, where no keys are asked for: one tenant, whose server it is."""


MAX_BUDGET: Final = 2**31


class Keys(Protocol):
    """The keys that are good now."""

    def identity_of(self, key: str) -> Identity | None:
        """Whose key it is; `None`: nobody's."""

    def budget_of(self, tenant: str) -> float | None:
        """This tenant's own bound: KV pages, or up to 1 a share of them; `None`: it has none."""

    def tenants(self) -> Set[str]:
        """Those that keys stand for. O(keys)."""


class FixedKeys:
    """Keys that were given once, each a tenant of its own.

    A single one is the operator's. Of several none is: that would be a matter of their order.
    """

    def __init__(self, keys: Iterable[str], secret: bytes):
        """Take the keys; `secret` makes names of them that say nothing of them."""
        keys = tuple(dict.fromkeys(keys))
        self._identities = {
            _digest(_sha256(key)): Identity(_name_of(key, secret), is_operator=len(keys) == 1)
            for key in keys
        }

    def identity_of(self, key: str) -> Identity | None:
        """See `Keys`."""
        return self._identities.get(_digest(_sha256(key)))

    def budget_of(self, tenant: str) -> float | None:
        """See `Keys`: what all tenants may have is said elsewhere."""
        return None

    def tenants(self) -> Set[str]:
        """See `Keys`."""
        return _tenants_of(self._identities)


class KeyFile:
    """Keys from a file, which is read again when it changes: keys come and go, tenants stay.

    One JSON object a line; empty lines and lines that begin with `#` are comments:

        {"key": "sk-1", "tenant": "team-a", "budget": 0.25}
        {"sha256": "<64 hex digits: of a key>", "tenant": "ops", "role": "operator"}
    """

    def __init__(self, path: Path, clock: Clock = monotonic):
        """Read the file. Raises ConfigError, naming line and field and never a key."""
        self._path = path
        self._clock = clock
        (self._identities, self._budgets), self._seen = _read(path)
        self._look_at_s = clock() + LOOK_EVERY_S

    def identity_of(self, key: str) -> Identity | None:
        """See `Keys`. Looks whether the file changed, at most once a second."""
        self._look()
        return self._identities.get(_digest(_sha256(key)))

    def tenants(self) -> Set[str]:
        """See `Keys`. Looks whether the file changed, at most once a second."""
        self._look()
        return _tenants_of(self._identities)

    def _look(self) -> None:
        now_s = self._clock()
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + LOOK_EVERY_S
            if _version_of(self._path) != self._seen:
                self.reload()

    def budget_of(self, tenant: str) -> float | None:
        """See `Keys`. As the file was when it was last read."""
        return self._budgets.get(tenant)

    def reload(self) -> None:
        """Read the file again. What can't be read is said, and the keys stay as they were."""
        self._seen = _version_of(self._path)
        try:
            (self._identities, self._budgets), self._seen = _read(self._path)
        except ConfigError as error:
            _logger.error("the keys stay as they were: %s", error)
        else:
            _logger.info("%d keys were read from %s", len(self._identities), self._path)


class _Content(NamedTuple):
    """What a file of keys says."""

    identities: Mapping[bytes, Identity]
    """By the digest of the key."""
    budgets: Mapping[str, float]
    """By tenant."""


_Version = tuple[int, int, int] | None
"""What changes when a file does; `None` where there is none."""


def _read(path: Path) -> tuple[_Content, _Version]:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the keys in {path} can't be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes, the limit for keys")
    parsed = _parse(content, path)
    warn_if_others_may_read(path, found.st_mode)
    return parsed, (found.st_mtime_ns, found.st_size, found.st_ino)


def _tenants_of(identities: Mapping[bytes, Identity]) -> Set[str]:
    return {identity.tenant for identity in identities.values()}


def _version_of(path: Path) -> _Version:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def warn_if_others_may_read(path: Path, mode: int) -> None:
    """Log it where a file of secrets is not its owner's alone."""
    if stat.S_IMODE(mode) & 0o077:
        _logger.warning("others than its owner may read %s, a secret: chmod 600 %s", path, path)


def _parse(content: bytes, path: Path) -> _Content:
    identities: dict[bytes, Identity] = {}
    budgets: dict[str, float] = {}
    lines: dict[bytes | str, int] = {}
    """Where each key, and each tenant's budget, was first."""
    for number, line in enumerate(content.splitlines(), 1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        where = f"{path}, line {number}:"
        fields = _fields(text, where)
        digest = _digest(_hash_in(fields, where))
        if digest in lines:
            raise ConfigError(f"{where} the same key as in line {lines[digest]}")
        lines[digest] = number
        tenant = _tenant_in(fields, where)
        identities[digest] = Identity(tenant, _is_operator_in(fields, where))
        budget = _budget_in(fields, where)
        if budget is None:
            continue
        if budgets.setdefault(tenant, budget) != budget:
            raise ConfigError(
                f"{where} budget is {budget:g}, and the same tenant's is {budgets[tenant]:g} in "
                f"line {lines[tenant]}: a tenant has one"
            )
        lines.setdefault(tenant, number)
    if not identities:
        raise ConfigError(f"{path} holds no key, so nobody could ask; give at least one")
    return _Content(identities, budgets)


def _fields(text: bytes, where: str) -> dict[str, Any]:
    """A line's fields. It may hold a key anywhere, so what is wrong is said in our words alone."""
    try:
        fields = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{where} this is not JSON") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} this is not a JSON object")
    if not fields.keys() <= set(_FIELDS):
        raise ConfigError(f"{where} a field is none of {', '.join(_FIELDS)}")
    for name, value in fields.items():
        if name != "budget" and not isinstance(value, str):
            raise ConfigError(f"{where} {name} must be a text")
    return fields


def _budget_in(fields: Mapping[str, Any], where: str) -> float | None:
    budget = fields.get("budget")
    if "budget" not in fields:
        return None
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ConfigError(f"{where} budget must be a number: of pages, or up to 1 a share of them")
    if not 0 < budget <= MAX_BUDGET or (budget > 1 and budget != int(budget)):
        raise ConfigError(
            f"{where} budget must be above 0, and a share up to 1 or a whole number of pages up to "
            f"{MAX_BUDGET}, not {budget:g}"
        )
    return float(budget)


def _hash_in(fields: Mapping[str, str], where: str) -> bytes:
    """SHA-256 of the line's key."""
    if ("key" in fields) == ("sha256" in fields):
        raise ConfigError(f"{where} give one of key and sha256")
    if "key" in fields:
        check_key(fields["key"], where)
        return _sha256(fields["key"])
    if _SHA256.fullmatch(fields["sha256"]) is None:
        raise ConfigError(f"{where} sha256 must be 64 hexadecimal digits in lower case")
    return bytes.fromhex(fields["sha256"])


def _tenant_in(fields: Mapping[str, str], where: str) -> str:
    tenant = fields.get("tenant", "")
    if _TENANT.fullmatch(tenant) is None:
        raise ConfigError(
            f"{where} tenant must be 1 to 64 letters, digits, '.', '_' or '-', and begin with a "
            "letter or digit"
        )
    if tenant == ANONYMOUS_TENANT:
        raise ConfigError(f"{where} the tenant {tenant!r} stands for those without a key")
    return tenant


def _is_operator_in(fields: Mapping[str, str], where: str) -> bool:
    role = fields.get("role", "user")
    if role not in ("user", "operator"):
        raise ConfigError(f"{where} role must be user or operator")
    return role == "operator"


def check_key(key: str, where: str) -> None:
    """Raise ConfigError for what no header can carry, without showing it."""
    if not (key.isascii() and key.isprintable() and key.strip() == key):
        raise ConfigError(
            f"{where} a key is of printable ASCII characters without spaces around: HTTP headers "
            "carry no others"
        )
    if not 1 <= len(key) <= MAX_KEY_CHARS:
        raise ConfigError(f"{where} a key has 1 to {MAX_KEY_CHARS} characters, not {len(key)}")


def _name_of(key: str, secret: bytes) -> str:
    """A tenant's name from its only key; long enough that no two are the same."""
    return "key-" + hmac.digest(secret, b"tenant of key " + key.encode(), "sha256").hex()[:32]


def _sha256(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _digest(key_hash: bytes) -> bytes:
    """What a key is looked up by: nobody outside can steer it towards another's."""
    return hashlib.blake2b(key_hash, key=_PROCESS_SECRET, digest_size=32).digest()
