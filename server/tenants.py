"""Whose cached pages a request may find: a namespace from tenant, salt and scope.

A namespace is made with a secret, so that nobody can tell from a page's key, on whatever level,
whether a known prompt of a known tenant is there. Knows no keys and no pages.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from kvpaging.base.errors import BadRequest
from kvpaging.base.secret_file import read_secret
from kvpaging.cache.prefix_key import SharedPrefix
from server.keys import ANONYMOUS_TENANT

CacheScope = Literal["tenant", "shared"]

_PURPOSE: Final = b"kvpaging namespace 1"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom a request is counted to, and whose pages it finds and leaves behind."""

    tenant: str = ANONYMOUS_TENANT
    namespace: bytes = b""
    shared: SharedPrefix | None = None
    max_pages: int | None = None
    """Pages that the tenant may have; `None`: as many as there are."""


class Namespaces:
    """Makes owners."""

    def __init__(self, secret: bytes, *, allows_shared: bool = False):
        self._secret = secret
        self._allows_shared = allows_shared

    def check(self, scope: CacheScope | None) -> None:
        """Raise `BadRequest` for a scope that the operator does not allow."""
        if scope == "shared" and not self._allows_shared:
            raise BadRequest(
                "cache_scope 'shared' is not allowed by this server's operator (--shared-scope); "
                "leave it out",
                param="cache_scope",
                code="shared_scope_off",
            )

    def owner(self, tenant: str, salt: str | None, num_shared_tokens: int = 0) -> Owner:
        """Give the owner of a request's pages.

        Args:
            tenant: as its key says.
            salt: what the client chose; it parts a tenant's pages further, and shared ones too.
            num_shared_tokens: of the prompt's beginning, whose pages all tenants may find.
        """
        shared = None
        if num_shared_tokens:
            shared = SharedPrefix(self._namespace(b"shared", "", salt), num_shared_tokens)
        return Owner(tenant, self._namespace(b"tenant", tenant, salt), shared)

    def _namespace(self, kind: bytes, tenant: str, salt: str | None) -> bytes:
        parts = (_PURPOSE, kind, tenant.encode(), (salt or "").encode("utf-8", "surrogatepass"))
        # With their lengths, so that no salt can look like part of a tenant's name.
        message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return hmac.digest(self._secret, message, "sha256")


def secret_for(secret_file: str | None, disk_cache: str | None) -> bytes:
    """The secret of this server's namespaces. Raises ConfigError.

    That of the file; else the one that lies with the pages on the disk, which find their tenants
    again after a restart; else a new one, since no page outlives this process.
    """
    if secret_file is not None:
        return read_secret(Path(secret_file))
    if disk_cache is not None:
        from kvpaging.levels.disk import kept_secret  # with its libraries, for those who need them

        return kept_secret(Path(disk_cache))
    return secrets.token_bytes(32)
