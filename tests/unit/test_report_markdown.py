"""The report in Markdown."""

from __future__ import annotations

from dataclasses import replace

from rwkvq.report.markdown import escape_markdown, markdown, markdown_table
from rwkvq.report.tables import Table
from tests.made_up_report import report


def test_cells_cannot_break_the_table() -> None:
    table = Table(("a", "b"), (("x|y", "two\nlines"), ("<b>", "*")), "lr", frozenset({1}))
    assert markdown_table(table).splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| x\\|y | **two lines** |",
        "| \\<b\\> | **\\*** |",
    ]


def test_links_and_headings_are_inert() -> None:
    assert escape_markdown("# [a](b) `c`") == "\\# \\[a\\](b) \\`c\\`"


def test_the_figures_are_all_there() -> None:
    text = markdown(report())
    for figure in ("18.9 MB", "10.8 MB", "| 9.145 |", "**0.05532 ± 0.00088**", "65,536 tokens", "3 min 52 s"):
        assert figure in text
    assert text.count("\n## ") == 3
    assert markdown(report()) == text


def test_without_evaluation_only_sizes_remain() -> None:
    text = markdown(replace(report(), quality=(), evaluation=None, disjointness=(), stages=()))
    assert "## Quality" not in text and "## Wall time" not in text and "## Honest bits" in text
