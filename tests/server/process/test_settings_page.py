"""`docs/settings.md` is made from the settings; run this file to make it again."""

from __future__ import annotations

from pathlib import Path

from server.settings import Settings, flag_of, variable_of

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"
HEAD = """# Settings

Each setting is a flag of `kvpaging serve` and an environment variable; the flag wins. An unknown
flag or `KVPAGING_` variable is refused. Sizes take units (`4GiB`, `512MiB`, plain bytes). What is
`auto` is decided at start and printed; `kvpaging config` prints what everything resolves to and
where it came from.

| flag | variable | default | |
|---|---|---|---|
"""


def expected() -> str:
    rows = [
        f"| `{flag_of(name)}` | `{variable_of(name)}` | {shown(field.default)} | "
        f"{field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return HEAD + "\n".join(rows) + "\n"


def shown(default: object) -> str:
    if default is None:
        return "auto or none"
    return f"`{default}`" if not isinstance(default, bool) else "on" if default else "off"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == expected()


if __name__ == "__main__":
    PAGE.write_text(expected(), "utf-8")
