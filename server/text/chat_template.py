"""A chat as one prompt text, by the checkpoint's own template.

The only module that imports `jinja2`. A template is a program from the checkpoint: it runs in
jinja2's immutable sandbox, sees the messages and nothing else, and its errors are the client's
(`BadRequest`), since most templates use them to refuse a conversation. Knows no token ids.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NoReturn, Self

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvpaging.base.errors import BadRequest, ConfigError

MAX_PROMPT_CHARS: Final = 64 * 1024 * 1024
"""More than any request body can hold: a template that writes more is looping."""


class ChatTemplate:
    """One template with the special tokens that it may name (`bos_token`, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self.source = source
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(
        cls, model_dir: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> Self | None:
        """Find the template: `chat_template.jinja`, or the field of `tokenizer_config.json`.

        The field is the template, or a list of named ones of which `default` is taken. `None` when
        there is none. Raises `ConfigError` on a field that is neither, or a syntax error.
        """
        path = model_dir / "chat_template.jinja"
        if path.is_file():
            source = path.read_text("utf-8")
        elif (field := tokenizer_config.get("chat_template")) is not None:
            source = _default_template(field)
        else:
            return None
        template = cls(source, special_tokens)
        try:
            _ = template._template
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template of {model_dir} is broken: {error}") from error
        return template

    @cached_property
    def _template(self) -> Template:
        # The settings for which published templates are written (transformers' chat templates).
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlocks]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        return environment.from_string(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Write the prompt; `variables` are further names that a template may know.

        Raises `BadRequest` when the template refuses the messages or fails on them.
        """
        context: dict[str, Any] = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **(variables or {}),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return "".join(_bounded(self._template.generate(context)))
        except BadRequest:
            raise
        except Exception as error:  # whatever a program from a checkpoint may raise
            reason = error.message if isinstance(error, TemplateError) else str(error)
            raise BadRequest(
                f"the model's chat template refuses these messages: {reason}", param="messages"
            ) from error


class _GenerationBlocks(Extension):
    """`{% generation %}`, which marks the assistant's words for training: here, just its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Give the nodes of the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _default_template(field: Any) -> str:
    if isinstance(field, str):
        return field
    if isinstance(field, list):
        named = {item.get("name"): item.get("template") for item in field if isinstance(item, dict)}
        source = named.get("default", next(iter(named.values()), None))
        if isinstance(source, str):
            return source
    raise ConfigError("chat_template in tokenizer_config.json is neither a text nor named texts")


def _bounded(pieces: Any) -> Any:
    """Pass the pieces on, up to the bound."""
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > MAX_PROMPT_CHARS:
            raise BadRequest(
                f"the chat template wrote more than {MAX_PROMPT_CHARS} characters", param="messages"
            )
        yield piece


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without jinja2's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
