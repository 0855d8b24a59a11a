"""Hostile text in every field of a report: the page keeps exactly the tags and attributes that it has without it."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from typing import Any

import pytest

from rwkvq.report.html import render
from rwkvq.report.markdown import markdown
from tests.made_up_report import report

PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></svg></table><script>alert(1)</script>",
    "<!-- ",
    "]]><svg onload=alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "javascript:alert(1)",
    "&#x3c;b&#x3e;",
    "<a href='http://example.org'>",
)
HARMLESS = "x"
"""The page is compared with one of this text: some tables are sorted or grouped by names."""
TEXTS = {"model", "name", "short", "text", "lambada", "source", "reason", "decision", "preset", "policy"}
"""Fields that hold text from outside; the others choose colours and columns, and come from a fixed set."""


def poisoned(value: Any, payload: str, name: str = "") -> Any:
    """A copy of nested dataclasses, tuples and dictionaries with `payload` behind every text from outside."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(value, **{name: poisoned(getattr(value, name), payload, name) for name in names})
    if isinstance(value, tuple):
        return tuple(poisoned(item, payload, name) for item in value)
    if isinstance(value, dict):
        inside = name in ("provenance", "value")
        return {f"{key}{payload}" if inside else key: poisoned(item, payload, "value") for key, item in value.items()}
    return f"{value}{payload}" if isinstance(value, str) and name in TEXTS | {"value"} else value


class Structure(HTMLParser):
    """The tags of a page with the names of their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        pytest.fail(f"a comment: {data[:80]!r}")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_stays_text(payload: str) -> None:
    data = report(layers=2, width=128)
    clean, page = Structure(render(poisoned(data, HARMLESS))), Structure(render(poisoned(data, payload)))
    assert page.tags == clean.tags
    assert page.links == clean.links
    assert page.text.count(payload) > 50  # shown as it is, character by character


@pytest.mark.parametrize(
    "payload", ["|", "\n# heading", "<img src=x>", "[a](http://example.org)", "`", "![a](b)", "**"]
)
def test_markdown_keeps_its_lines_and_columns(payload: str) -> None:
    data = report(layers=2, width=128)
    clean, text = markdown(poisoned(data, HARMLESS)), markdown(poisoned(data, payload))
    assert len(text.splitlines()) == len(clean.splitlines())
    for before, after in zip(clean.splitlines(), text.splitlines(), strict=True):
        assert bars(before) == bars(after)
        assert after.lstrip("\\")[:2] == before[:2]
    assert not re.search(r"(?<!\\)[\[\]<`]", text)


def bars(line: str) -> int:
    """Bars of a line that end a cell."""
    return line.count("|") - line.count("\\|")
