from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpaging.base.errors import BadRequest, ConfigError
from server.tenants import Namespaces, secret_for

NAMES = st.text(st.characters(codec="ascii"), min_size=1, max_size=6)
SALTS = st.none() | st.text(st.characters(), max_size=6)  # with surrogates that stand alone


@given(NAMES, SALTS, NAMES, SALTS)
def test_a_salt_narrows_and_never_reaches_another_tenant(
    tenant: str, salt: str | None, other: str, other_salt: str | None
) -> None:
    namespaces = Namespaces(b"s" * 32)
    one, two = namespaces.owner(tenant, salt), namespaces.owner(other, other_salt)
    is_same = (tenant, salt or "") == (other, other_salt or "")
    assert (one.namespace == two.namespace) == is_same
    assert one.shared is two.shared is None
    assert (one.tenant, two.tenant) == (tenant, other)


@given(NAMES, SALTS, NAMES, SALTS)
def test_what_is_shared_is_no_tenants_and_a_salt_parts_it_too(
    tenant: str, salt: str | None, other: str, other_salt: str | None
) -> None:
    namespaces = Namespaces(b"s" * 32)
    one, two = namespaces.owner(tenant, salt, 7), namespaces.owner(other, other_salt, 7)
    assert one.shared is not None
    assert two.shared is not None
    assert (one.shared.namespace == two.shared.namespace) == ((salt or "") == (other_salt or ""))
    assert one.shared.namespace not in (one.namespace, two.namespace)
    assert one.namespace == namespaces.owner(tenant, salt).namespace
    assert one.shared.num_tokens == 7


def test_another_secret_is_another_cache() -> None:
    one, other = (Namespaces(secret).owner("a", None, 1) for secret in (b"s" * 32, b"t" * 32))
    assert one.namespace != other.namespace
    assert one.shared != other.shared


def test_what_the_operator_does_not_allow_is_refused_by_name() -> None:
    closed, open_ = Namespaces(b"s"), Namespaces(b"s", allows_shared=True)
    for scope in (None, "tenant", "shared"):
        open_.check(scope)
    closed.check(None)
    closed.check("tenant")
    with pytest.raises(BadRequest, match="cache_scope 'shared' is not allowed") as caught:
        closed.check("shared")
    assert (caught.value.param, caught.value.code) == ("cache_scope", "shared_scope_off")


def test_the_secret_is_the_files_or_lies_with_the_pages_or_is_new(tmp_path: Path) -> None:
    file, pages = tmp_path / "secret", tmp_path / "pages"
    file.write_bytes(b"k" * 32 + b"\n")
    assert secret_for(str(file), str(pages)) == b"k" * 32
    assert not pages.exists()
    kept = secret_for(None, str(pages))
    assert secret_for(None, str(pages)) == kept
    assert len(kept) == 64
    assert stat.S_IMODE((pages / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(pages.stat().st_mode) == 0o700
    assert secret_for(None, str(tmp_path / "others")) != kept
    assert secret_for(None, None) != secret_for(None, None)


def test_a_secret_that_can_not_be_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing can't be read: No such file"):
        secret_for(str(tmp_path / "missing"), None)
    (tmp_path / "short").write_bytes(b" " * 20 + b"hush")
    with pytest.raises(ConfigError, match="has 4 bytes; give at least 16") as caught:
        secret_for(str(tmp_path / "short"), None)
    assert "hush" not in str(caught.value)


def test_no_secret_is_put_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds other files"):
        secret_for(None, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_where_a_name_ends_and_a_salt_begins_is_part_of_the_namespace() -> None:
    namespaces = Namespaces(b"s" * 32)
    cuts = [("a", "bc"), ("ab", "c"), ("abc", None)]
    assert len({namespaces.owner(tenant, salt).namespace for tenant, salt in cuts}) == 3
