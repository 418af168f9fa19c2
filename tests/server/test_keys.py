from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpaging.base.errors import ConfigError
from server.keys import FixedKeys, Identity, KeyFile

SECRET_KEY = "sk-hush-hush"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, *lines: object) -> Path:
    """As one should: under another name first. Gives another inode each time."""
    aside = path.with_suffix(".new")
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    aside.write_text("\n".join(texts))
    aside.chmod(0o600)
    aside.rename(path)
    return path


def entry(key: str, tenant: str, **more: str) -> dict[str, str]:
    return {"key": key, "tenant": tenant, **more}


def test_a_key_stands_for_its_tenant(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"sk-ops").hexdigest()
    keys = KeyFile(
        write(
            tmp_path / "keys",
            "# who may ask",
            "",
            entry("sk-1", "team-a", comment="until the first"),
            "  # indented",
            entry("sk-2", "team-a"),
            {"sha256": digest, "tenant": "ops", "role": "operator"},
        )
    )
    assert keys.identity_of("sk-1") == Identity("team-a", is_operator=False)
    assert keys.identity_of("sk-2") == keys.identity_of("sk-1")
    assert keys.identity_of("sk-ops") == Identity("ops", is_operator=True)
    for stranger in ("", "sk-", "sk-11", digest, "SK-1", "sk-1 ", "\udcff", "ключ"):
        assert keys.identity_of(stranger) is None


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "this is not JSON"),
        ("[" * 100_000, "this is not JSON"),
        ('"sk-hush-hush"', "not a JSON object"),
        ({"sk-hush-hush": "team-a"}, "a field is none of tenant, key, sha256"),
        (entry(SECRET_KEY, ""), "tenant must be"),
        ({"key": SECRET_KEY}, "tenant must be"),
        (entry(SECRET_KEY, "a b"), "tenant must be"),
        (entry(SECRET_KEY, "x" * 65), "tenant must be"),
        (entry(SECRET_KEY, "anonymous"), "stands for those without a key"),
        ({"tenant": "a"}, "give one of key and sha256"),
        (entry(SECRET_KEY, "a", sha256="0" * 64), "give one of key and sha256"),
        ({"tenant": "a", "sha256": SECRET_KEY}, "sha256 must be 64 hexadecimal digits"),
        ({"tenant": "a", "sha256": "A" * 64}, "sha256 must be 64 hexadecimal digits"),
        (entry("", "a"), "a key has 1 to 1024 characters, not 0"),
        (entry("k" * 1025, "a"), "a key has 1 to 1024 characters, not 1025"),
        (entry(" " + SECRET_KEY, "a"), "printable ASCII"),
        (entry(SECRET_KEY + "é", "a"), "printable ASCII"),
        (entry(SECRET_KEY, "a", role="root"), "role must be user or operator"),
        ({"key": SECRET_KEY, "tenant": 7}, "tenant must be a text"),
        (entry("sk-1", "b"), "the same key as in line 1"),
        ({**entry("sk-2", "b"), "budget": 0}, "budget must be above 0"),
        ({**entry("sk-2", "b"), "budget": -0.5}, "not -0.5"),
        ({**entry("sk-2", "b"), "budget": 1.5}, "whole number of pages up to 2147483648, not 1.5"),
        ({**entry("sk-2", "b"), "budget": 2**31 + 1}, "up to 2147483648, not 2"),
        ({**entry("sk-2", "b"), "budget": True}, "budget must be a number"),
        ({**entry("sk-2", "b"), "budget": SECRET_KEY}, "budget must be a number"),
        ({**entry("sk-2", "b"), "budget": None}, "budget must be a number"),
        ('{"key": "sk-2", "tenant": "b", "budget": 1e999}', "not"),
    ],
)
def test_a_wrong_line_is_named_and_not_shown(tmp_path: Path, line: object, complaint: str) -> None:
    path = write(tmp_path / "keys", entry("sk-1", "a"), line)
    with pytest.raises(ConfigError, match=r"keys, line 2: ") as caught:
        KeyFile(path)
    assert complaint in str(caught.value)
    assert "hush" not in str(caught.value)


@given(st.binary(max_size=60))
def test_whatever_is_in_the_file_it_is_read_or_refused(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        KeyFile(path)


def test_a_file_that_lets_nobody_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no key"):
        KeyFile(write(tmp_path / "keys", "# none yet"))
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        KeyFile(tmp_path / "missing")


def test_keys_come_and_go_while_tenants_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    path = write(tmp_path / "keys", entry("sk-old", "team-a"))
    keys = KeyFile(path, clock)
    write(path, entry("sk-new", "team-a"))
    assert keys.identity_of("sk-old"), "it looks once a second"
    clock.now += 1.0
    assert keys.identity_of("sk-old") is None
    assert keys.identity_of("sk-new") == Identity("team-a", is_operator=False)

    write(path, entry("sk-hush", "team-a"), "{sk-hush")
    clock.now += 1.0
    assert keys.identity_of("sk-new"), "what is wrong changes nothing"
    path.unlink()
    clock.now += 1.0
    assert keys.identity_of("sk-new")
    clock.now += 1.0
    assert keys.identity_of("sk-new")
    complaints = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(complaints) == 2, "once for each change"
    assert "line 2: this is not JSON" in complaints[0]
    assert "hush" not in caplog.text

    write(path, entry("sk-3", "team-b"))
    keys.reload()  # as SIGHUP does: at once
    assert keys.identity_of("sk-3") == Identity("team-b", is_operator=False)
    assert keys.identity_of("sk-new") is None


def test_a_tenant_has_one_budget_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(
        tmp_path / "keys",
        entry("sk-1", "a"),
        {**entry("sk-2", "a"), "budget": 0.25},
        {**entry("sk-3", "a"), "budget": 0.25},
        {**entry("sk-4", "b"), "budget": 40},
        entry("sk-5", "c"),
    )
    keys = KeyFile(path)
    assert [keys.budget_of(tenant) for tenant in "abcd"] == [0.25, 40.0, None, None]
    write(path, {**entry("sk-1", "a"), "budget": 7}, {**entry("sk-2", "a"), "budget": 8})
    keys.reload()
    assert "line 2: budget is 8, and the same tenant's is 7 in line 1" in caplog.text
    assert keys.budget_of("a") == 0.25, "what is wrong changes nothing"
    write(path, {**entry("sk-1", "a"), "budget": 7})
    keys.reload()
    assert [keys.budget_of(tenant) for tenant in "ab"] == [7.0, None]
    assert FixedKeys(("one",), b"secret").budget_of("one") is None


def test_others_who_may_read_the_file_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys", entry("sk-1", "a"))
    KeyFile(path)
    assert not caplog.records
    os.chmod(path, 0o640)
    KeyFile(path)
    assert f"chmod 600 {path}" in caplog.text


def test_a_file_that_nests_too_deeply_leaves_the_keys_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path / "keys", entry("sk-1", "a"), entry("sk-2", "b"))
    keys = KeyFile(path)
    assert keys.tenants() == {"a", "b"}
    path.write_text("[" * 100_000)
    keys.reload()
    assert keys.identity_of("sk-1") == Identity("a", is_operator=False)


def test_keys_that_are_listed_are_tenants_of_their_own() -> None:
    keys = FixedKeys(("one", "two"), b"secret")
    first, second = keys.identity_of("one"), keys.identity_of("two")
    assert first is not None
    assert second is not None
    assert first.tenant != second.tenant
    assert not first.is_operator
    assert not second.is_operator
    assert keys.identity_of("three") is None
    again, elsewhere = FixedKeys(("two", "one"), b"secret"), FixedKeys(("one", "two"), b"other")
    assert again.identity_of("one") == first, "a name depends on no order"
    assert elsewhere.identity_of("one") != first, "nor can it be guessed without the secret"
    alone = FixedKeys(("one", "one"), b"secret").identity_of("one")
    assert alone is not None
    assert alone.is_operator


def test_no_key_is_held(tmp_path: Path) -> None:
    path = write(tmp_path / "keys", entry(SECRET_KEY, "a"))
    for keys in (KeyFile(path), FixedKeys((SECRET_KEY,), b"secret")):
        assert "hush" not in repr(vars(keys))
        assert hashlib.sha256(SECRET_KEY.encode()).digest() not in keys._identities
