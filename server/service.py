"""What the routes share: one engine, its text, its limits, and the door.

Knows no wire format.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, cast

from fastapi import Depends, Request

from kvpaging.base.config import EngineConfig
from kvpaging.base.errors import BadRequest, EngineDied, Overloaded, PromptTooLong
from kvpaging.cache.retention import MAX_RETENTION_PRIORITY
from kvpaging.engine.messages import PagePicture
from kvpaging.scheduling import admission
from server.client import EngineClient, EngineState
from server.envelope import identity_of
from server.errors import ApiError, answer_to, draining, loading, stalled
from server.generation import Done, Order, TextDelta, generate
from server.keys import ANONYMOUS_TENANT, Keys
from server.observe.metrics import Metrics
from server.observe.record import RequestRecord
from server.preload import Preloader
from server.schemas.body import BodyBudget
from server.schemas.fields import CacheFields
from server.schemas.pins import PrefixFields
from server.schemas.preload import PreloadItem
from server.sse import StreamLimits
from server.tenants import Namespaces, Owner
from server.text import Text
from server.text.tokenizer import LONG_TEXT_CHARS, Tokenizer

SYSTEM_ROLES: Final = ("system", "developer")


STATS_WAIT_S: Final = 1.0
"""A scrape waits no longer for an engine in a long step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig:
    """What the operator decides about HTTP."""

    served_model_name: str
    keys: Keys | None = None
    """`None`: everybody may ask."""
    operator_key: str | None = None
    """Opens the operator's routes; see `server.operator_door`."""
    namespaces: Namespaces = field(default_factory=lambda: Namespaces(secrets.token_bytes(32)))
    max_body_bytes: int = 16 * 1024 * 1024
    body_timeout_s: float = 30.0
    """For a request's whole body to arrive."""
    max_bodies_bytes: int = 256 * 1024 * 1024
    """Of all bodies that arrive at the same time; at least one always may."""
    default_max_new_tokens: int = 128
    """For `/generate` and TGI's dialect; what fits if that is less."""
    stream: StreamLimits = field(default_factory=StreamLimits)
    tenant_budget: float | None = None
    """KV pages that each tenant may have that has no budget of its own; up to 1: that share."""
    max_cache_priority: int | None = None
    """That requests may ask for; `None`: any where there is one tenant, else 0."""
    preload: Path | None = None
    """A file of prefixes to compute ahead: see `server.preload`."""
    drain_retry_s: float = 5.0
    """What `Retry-After` says while the server is going away."""


class Service:
    """One engine behind HTTP. Lives on the event loop's thread."""

    def __init__(self, config: AppConfig, client: EngineClient, text: Text | None):
        self.config = config
        self.client = client
        self.metrics = Metrics(client.status)
        self.preloader = Preloader(self)
        self.created = int(time.time())
        self.is_draining = False
        self.bodies = BodyBudget(max(config.max_bodies_bytes, config.max_body_bytes))
        self._text = text
        self._text_lock = asyncio.Lock()
        self._pages: PagePicture | None = None
        self._pages_until = 0.0
        self._pages_lock = asyncio.Lock()

    def drain(self) -> None:
        """Refuse new generation requests from now on; running ones go on."""
        self.is_draining = True

    def require_not_draining(self) -> None:
        """Raise `ApiError` (503) once `drain` was called."""
        if self.is_draining:
            raise draining(self.config.drain_retry_s)

    def engine_config(self) -> EngineConfig:
        """Give the engine's limits. Raises `ApiError` (503) while there is no engine."""
        status = self.client.status()
        if status.config is None or status.state in (EngineState.LOADING, EngineState.DEAD):
            raise loading(f"{status.state}: {status.detail}")
        return status.config

    async def text(self) -> Text:
        """Give the model's text, read at the first call if it was not given at the start."""
        if self._text is None:
            model_dir = self.engine_config().model_dir
            async with self._text_lock:
                if self._text is None:
                    self._text = await asyncio.to_thread(Text.load, model_dir)
        return self._text

    def open_door(self, record: RequestRecord) -> EngineConfig:
        """Let a generation request in, or raise `ApiError` (503)."""
        try:
            self.require_not_draining()
            status = self.client.status()
            if status.state is EngineState.STALLED:
                raise stalled(status.detail)
            return self.engine_config()
        except ApiError as error:
            self.metrics.rejected(error.code)
            raise

    async def pages(self) -> PagePicture:
        """Give every page as it was a moment ago: a picture costs the engine time.

        Each is shown for a second, or for ten times what it took, however many ask. Raises
        `EngineDied`.
        """
        async with self._pages_lock:
            begin = time.monotonic()
            if self._pages is None or begin >= self._pages_until:
                self._pages = await self.client.pages()
                took_s = time.monotonic() - begin
                self._pages_until = begin + took_s + max(1.0, 10 * took_s)
            return self._pages

    async def look_at_cache(self) -> None:
        """Let the metrics have the cache's statistics, if the engine gives them at once."""
        with contextlib.suppress(EngineDied, TimeoutError):
            async with asyncio.timeout(STATS_WAIT_S):
                stats = await self.client.cache_stats()
                self.metrics.see_cache(stats, self.client.status().num_restarts)

    def max_new_tokens(self, num_prompt_tokens: int, asked: int | None, default: int | None) -> int:
        """Give the length of an output: what was asked, else what fits, at most `default`.

        What was asked and does not fit is refused later, with the numbers; so is a prompt that
        leaves no room for even one token.
        """
        if asked is not None:
            return asked
        fits = admission.max_new_tokens_that_fit(num_prompt_tokens, self.engine_config().scheduler)
        return max(1, fits if default is None else min(default, fits))

    async def generate(
        self,
        orders: Sequence[Order],
        record: RequestRecord,
        field_names: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[TextDelta | Done, None]:
        """See `server.generation.generate`.

        Limits are checked for all orders before the first one begins. `field_names` are the
        dialect's words for the engine's fields, for the errors.
        """
        try:
            self._check_number(len(orders))
            for order in orders:
                self._check_limits(order, field_names or {})
            news = generate(
                self.client, await self.text(), orders, metrics=self.metrics, record=record
            )
            async with aclosing(news):
                async for item in news:
                    yield item
        except (BadRequest, Overloaded) as error:
            self.metrics.rejected(answer_to(error).code)
            raise

    def _check_number(self, num_orders: int) -> None:
        """Refuse for good what would be told to come back for ever."""
        limits = self.engine_config().scheduler
        most = limits.max_num_seqs + limits.max_num_waiting
        if num_orders > most:
            raise BadRequest(
                f"at most {most} prompts fit in one call here ({limits.max_num_seqs} run and "
                f"{limits.max_num_waiting} wait), not {num_orders}",
                param="prompt",
            )

    def _check_limits(self, order: Order, field_names: Mapping[str, str]) -> None:
        config = self.engine_config()
        try:
            self._check_priority(order.retention.priority)
            admission.check(order.request(), config.scheduler, config.vocab_size)
        except BadRequest as error:
            message, param = error.message, error.param
            for ours, theirs in field_names.items():
                if "_" in ours:  # else it may be a word of a sentence
                    message = message.replace(ours, theirs)
                param = theirs if param == ours else param
            raise BadRequest(message, param=param, code=error.code) from error

    def _check_priority(self, priority: int) -> None:
        """Refuse a priority that would keep other tenants' pages out for as long as it is used."""
        most = self.config.max_cache_priority
        if most is None:
            keys = self.config.keys
            most = MAX_RETENTION_PRIORITY if keys is None or len(keys.tenants()) == 1 else 0
        if priority > most:
            raise BadRequest(
                f"cache.priority may be at most {most} on this server (--max-cache-priority), not "
                f"{priority}",
                param="cache.priority",
            )

    async def chat_ids(
        self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """Give a conversation as the model reads it.

        Raises `BadRequest` when the model has no chat template, or its template refuses.
        """
        text = await self.text()
        template, tokenizer = text.chat_template, text.tokenizer
        if template is None:
            raise BadRequest(
                "this model has no chat template; use /v1/completions or /generate",
                param="messages",
                code="no_chat_template",
            )

        num_chars = sum(len(message["content"]) for message in messages)
        self.check_chars(num_chars, tokenizer, "messages")

        def render_and_encode() -> list[int]:
            prompt = template.render(messages, variables=variables)
            self.check_chars(len(prompt), tokenizer, "messages")
            # The template writes the special tokens itself.
            return tokenizer.encode(prompt, add_special_tokens=False)

        if num_chars <= LONG_TEXT_CHARS:
            return tuple(render_and_encode())
        return tuple(await asyncio.to_thread(render_and_encode))

    async def num_system_tokens(
        self,
        messages: Sequence[Mapping[str, str]],
        variables: Mapping[str, Any],
        token_ids: Sequence[int],
    ) -> int:
        """Count the tokens before the first message that is not the system's.

        Those are what the conversation has in common with two others that begin alike and have
        nothing else in common: none of what a user wrote is among them.
        """
        system = list(
            itertools.takewhile(lambda message: message["role"] in SYSTEM_ROLES, messages)
        )
        begun_alike = [token_ids]
        try:
            for word in ("0", "x"):
                others = [*system, {"role": "user", "content": word}]
                begun_alike.append(await self.chat_ids(others, variables))
        except BadRequest:
            return 0  # a template that knows no such conversation: what is common can't be told
        same = (len(set(tokens)) == 1 for tokens in zip(*begun_alike, strict=False))
        return sum(1 for _ in itertools.takewhile(bool, same))

    async def prefix_ids(self, asked: PrefixFields) -> tuple[tuple[int, ...], int]:
        """Give a prefix as the model reads it, and how many of its tokens may be shared."""
        if asked.messages is None:
            token_ids = await self.prompt_ids(asked.prompt or "")
            return token_ids, len(token_ids) if asked.cache_scope == "shared" else 0
        messages = [message.for_template() for message in asked.messages]
        variables = asked.chat_template_kwargs
        token_ids = await self.chat_ids(messages, variables)
        if asked.cache_scope != "shared":
            return token_ids, 0
        return token_ids, await self.num_system_tokens(messages, variables, token_ids)

    async def prompt_ids(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Give the prompt as the model reads it; token ids are taken as they are.

        Raises `BadRequest` when it is empty.
        """
        if not prompt:
            raise BadRequest("the prompt is empty; it needs at least 1 token", param="prompt")
        if not isinstance(prompt, str):
            return tuple(prompt)
        return await self.text_ids(prompt)

    async def text_ids(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Give a text as the model reads it. Raises `PromptTooLong` when it can't ever fit."""
        tokenizer = (await self.text()).tokenizer
        self.check_chars(len(text), tokenizer)
        return tuple(await tokenizer.encode_async(text, add_special_tokens=add_special_tokens))

    def check_chars(self, num_chars: int, tokenizer: Tokenizer, param: str = "prompt") -> None:
        """Refuse, before any work, a text of more characters than the model's length can hold."""
        max_model_len = self.engine_config().scheduler.max_model_len
        most = max_model_len * tokenizer.max_token_chars
        if num_chars > most:
            raise PromptTooLong(
                f"{num_chars} characters are over the model's length of {max_model_len} tokens, "
                f"which are at most {most} characters",
                param=param,
            )

    def owner_of(self, request: Request, asked: CacheFields, num_shared_tokens: int) -> Owner:
        """Give whose pages a request may find: its tenant's, and of its prompt's first tokens all.

        Raises `BadRequest` for a scope that the operator does not allow.
        """
        self.config.namespaces.check(asked.cache_scope)
        tenant = identity_of(request.scope).tenant
        num_shared_tokens = num_shared_tokens if asked.cache_scope == "shared" else 0
        owner = self.config.namespaces.owner(tenant, asked.cache_salt, num_shared_tokens)
        return replace(owner, max_pages=self.max_pages_of(tenant))

    def tenant_of(self, item: PreloadItem) -> str:
        """Give the tenant for whom a prefix shall be computed.

        Raises `BadRequest` for one that no key stands for: nobody could find its pages, or end its
        pins.
        """
        keys = self.config.keys
        tenants = {ANONYMOUS_TENANT} if keys is None else keys.tenants()
        if item.tenant is None:
            if len(tenants) > 1:
                raise BadRequest(f"say for which of the {len(tenants)} tenants", param="tenant")
            return next(iter(tenants))
        if item.tenant not in tenants:
            raise BadRequest(f"no API key stands for the tenant {item.tenant!r}", param="tenant")
        return item.tenant

    def max_pages_of(self, tenant: str) -> int | None:
        """Give the pages that a tenant may have; `None`: as many as there are.

        Its own budget goes before the one that all have.
        """
        keys = self.config.keys
        own = None if keys is None else keys.budget_of(tenant)
        budget = self.config.tenant_budget if own is None else own
        if budget is None:
            return None
        num_pages = self.engine_config().scheduler.num_pages
        return max(1, int(budget * num_pages)) if budget <= 1 else int(budget)


def service_of(request: Request) -> Service:
    """Give the service of the app that this request came to."""
    return cast(Service, request.app.state.service)


ServiceDep = Annotated[Service, Depends(service_of)]
