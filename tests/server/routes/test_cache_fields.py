"""`cache_scope` and `cache_salt` in every dialect: whose pages the engine is told that they are."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import tiny_text
from fake_engine import FakeEngineClient
from http_app import MODEL, Caller, make_app

from kvpaging.scheduling.request import Request
from server.app import AppConfig, create_app
from server.keys import FixedKeys
from server.tenants import Namespaces
from server.text import ChatTemplate, Text

TEXT = "The quick brown fox "
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def native(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/generate", {"prompt": TEXT, "max_new_tokens": 2, **fields}


def tgi(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/generate", {"inputs": TEXT, "parameters": {"max_new_tokens": 2, **fields}}


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": MODEL, "prompt": TEXT, "max_tokens": 2, **fields}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": "hi"}]
    return "/v1/chat/completions", {"model": MODEL, "messages": messages, "max_tokens": 2, **fields}


DIALECTS = pytest.mark.parametrize("dialect", [native, tgi, completion, chat])


class Server:
    def __init__(self, *, allows_shared: bool = True):
        self.engine = FakeEngineClient()
        config = AppConfig(
            served_model_name=MODEL,
            keys=FixedKeys(("one", "two"), b"secret"),
            namespaces=Namespaces(b"s" * 32, allows_shared=allows_shared),
        )
        text = Text(tiny_text.text().tokenizer, ChatTemplate(TEMPLATE, {}))
        self._app = create_app(config, self.engine, text)

    def ask(self, key: str, path: str, body: dict[str, Any]) -> httpx.Response:
        return Caller(self._app, {"Authorization": f"Bearer {key}"}).post(path, body)

    def order(self, key: str, path: str, body: dict[str, Any]) -> Request:
        response = self.ask(key, path, body)
        assert response.status_code == 200, response.text
        return self.engine.seen[-1]


@DIALECTS
def test_a_key_has_its_own_pages_and_a_salt_narrows_them(dialect: Any) -> None:
    server = Server()
    plain = server.order("one", *dialect())
    assert plain.tenant.startswith("key-")
    assert plain.shared is None
    assert server.order("one", *dialect(cache_scope="tenant")).namespace == plain.namespace
    assert server.order("one", *dialect(cache_salt="")).namespace == plain.namespace
    namespaces = [plain.namespace]
    for salt in ("a", "b", "\0", "é", "😀" * 1024, "shared", plain.tenant):
        order = server.order("one", *dialect(cache_salt=salt))
        assert order.tenant == plain.tenant
        namespaces.append(order.namespace)
    other = server.order("two", *dialect(cache_salt="a"))
    assert other.tenant != plain.tenant
    namespaces += [other.namespace, server.order("two", *dialect()).namespace]
    assert len(set(namespaces)) == len(namespaces)


@DIALECTS
def test_a_shared_beginning_is_the_same_for_all_tenants(dialect: Any) -> None:
    server = Server()
    one, two = (server.order(key, *dialect(cache_scope="shared")) for key in ("one", "two"))
    assert one.shared is not None
    assert one.shared == two.shared
    assert one.namespace != two.namespace
    salted = server.order("one", *dialect(cache_scope="shared", cache_salt="a"))
    assert salted.shared is not None
    assert salted.shared.namespace not in (one.shared.namespace, salted.namespace)
    if dialect is not chat:
        assert one.shared.num_tokens == len(one.prompt_token_ids)


def test_of_a_chat_only_what_comes_before_the_users_words_is_shared() -> None:
    server = Server()
    encode = tiny_text.text().tokenizer.encode
    system = {"role": "system", "content": TEXT}
    before_user = encode(f"<system>{TEXT}<user>", add_special_tokens=False)
    for word in ("hi", "0", "x", "0x", "x0", "", TEXT):
        path, body = chat(cache_scope="shared")
        body["messages"] = [system, {"role": "user", "content": word}]
        shared = server.order("one", path, body).shared
        # A tokenizer may join the last characters before the user's with his first ones.
        assert shared is not None
        assert len(before_user) - 2 <= shared.num_tokens <= len(before_user)
    path, body = chat(cache_scope="shared")
    body["messages"] = [{"role": "user", "content": TEXT}]
    shared = server.order("one", path, body).shared
    assert shared is None or shared.num_tokens <= len(encode("<user>", add_special_tokens=False))


@DIALECTS
def test_what_the_operator_does_not_allow_is_refused(dialect: Any) -> None:
    server = Server(allows_shared=False)
    path, body = dialect(cache_scope="shared")
    response = server.ask("one", path, body)
    error = response.json()["error"]
    if dialect is tgi:
        assert response.status_code == 422
        assert "cache_scope 'shared' is not allowed" in error
    else:
        assert response.status_code == 400
        assert (error["param"], error["code"]) == ("cache_scope", "shared_scope_off")
    assert not server.engine.seen


@DIALECTS
@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"cache_salt": "x" * 1025}, "cache_salt: must have at most 1024 characters, not 1025"),
        ({"cache_salt": 7}, "cache_salt must be a text, not 7"),
        ({"cache_scope": "all"}, "cache_scope must be 'tenant' or 'shared', not \"all\""),
    ],
)
def test_wrong_values_are_named(dialect: Any, fields: Any, complaint: str) -> None:
    server = Server()
    response = server.ask("one", *dialect(**fields))
    error = response.json()["error"]
    assert complaint in (error if dialect is tgi else error["message"])
    assert not server.engine.seen


@pytest.mark.parametrize("name", ["cache_scope", "cache_salt"])
def test_tgis_fields_are_not_overlooked_where_they_do_not_belong(name: str) -> None:
    path, body = tgi()
    response = Server().ask("one", path, {**body, name: "tenant"})
    assert response.status_code == 422
    assert f"{name} belongs into parameters" in response.text


def test_without_keys_all_are_one_tenant_and_a_salt_narrows_it() -> None:
    engine = FakeEngineClient()
    http = Caller(make_app(engine))
    for body in ({}, {}, {"cache_salt": "a"}):
        http.post("/generate", {"prompt": TEXT, "max_new_tokens": 1, **body})
    first, second, salted = engine.seen
    assert first.tenant == "anonymous"
    assert first.namespace == second.namespace != salted.namespace
