from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvpaging.base.errors import BadRequest, ConfigError
from server.text import ChatTemplate

MESSAGES = [{"role": "user", "content": "Grüße <b>"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, variables=variables)


def test_blocks_leave_no_blank_lines_and_special_tokens_are_known() -> None:
    source = """{{ bos_token }}
{% for m in messages %}
  {{ m.role }}: {{ m['content'] }}
{% endfor %}
"""
    assert render(source) == "<s>\n  user: Grüße <b>\n"


def test_what_published_templates_use_is_there() -> None:
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "Grüße <b>"}]'
    assert render("{{ {'a': 1} | tojson(indent=1) }}") == '{\n "a": 1\n}'
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))
    assert (
        render("{% for m in [1, 2] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}")
        == "1"
    )
    assert render("{% generation %}{{ messages[0].role }}{% endgeneration %}") == "user"
    assert render("{{ tools is none }}{{ enable_thinking }}", enable_thinking=False) == "TrueFalse"
    assert render("{% if add_generation_prompt %}go{% endif %}") == "go"
    assert render("{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }}") == "2"


def test_a_refusal_is_the_clients_error() -> None:
    with pytest.raises(BadRequest, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content.x }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(100000000) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0].nothing.more }}",
    ],
)
def test_whatever_fails_inside_is_no_crash(source: str) -> None:
    with pytest.raises(BadRequest, match="chat template refuses"):
        render(source)


def test_the_file_wins_over_the_field(tmp_path: Path) -> None:
    config = {"chat_template": "field"}
    found = ChatTemplate.load(tmp_path, config, {})
    assert found is not None
    assert found.source == "field"
    (tmp_path / "chat_template.jinja").write_text("file")
    found = ChatTemplate.load(tmp_path, config, {})
    assert found is not None
    assert found.source == "file"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    found = ChatTemplate.load(tmp_path, {"chat_template": named}, {})
    assert found is not None
    assert found.source == "d"
    assert ChatTemplate.load(tmp_path, {}, {}) is None


@pytest.mark.parametrize("field", [7, [], [{"name": "default"}], "{% for %}", "{{ x | nosuch }}"])
def test_a_broken_template_is_found_at_the_start(tmp_path: Path, field: object) -> None:
    with pytest.raises(ConfigError):
        ChatTemplate.load(tmp_path, {"chat_template": field}, {})
