"""The report in Markdown, for Prefect artifacts and pull requests: the figures, without pictures."""

from __future__ import annotations

import re

from rwkvq.report.data import ReportData
from rwkvq.report.headlines import headlines
from rwkvq.report.tables import (
    Table,
    bits_table,
    budget_sentences,
    disjointness_sentences,
    distillation_sentences,
    measured_on,
    model_sentence,
    parts_table,
    quality_table,
    stage_table,
)


def escape_markdown(text: str) -> str:
    """Plain text on one line, safe in Markdown prose and table cells."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", flat)


def markdown_table(table: Table) -> str:
    """A table in the pipe syntax."""
    lines = [
        "| " + " | ".join(map(escape_markdown, table.columns)) + " |",
        "|" + "|".join(" ---: " if side == "r" else " --- " for side in table.align) + "|",
    ]
    for row in table.rows:
        cells = [escape_markdown(cell) for cell in row]
        lines.append(
            "| " + " | ".join(f"**{cell}**" if at in table.strong else cell for at, cell in enumerate(cells)) + " |"
        )
    return "\n".join(lines)


def markdown(report: ReportData) -> str:
    """The whole report as Markdown, without per-tensor rows."""
    cards = []
    for card in headlines(report):
        figures = ", ".join(f"{label} {value}" for label, value in card.figures)
        cards.append(
            f"- **{escape_markdown(card.title)}**: {escape_markdown(figures)}"
            + (f" ({escape_markdown(card.remark)})" if card.remark else "")
        )
    sections = [f"# {escape_markdown(report.model)}", escape_markdown(model_sentence(report)), "\n".join(cards)]
    if report.quality:
        sections += ["## Quality", markdown_table(quality_table(report))]
        sections += [escape_markdown(sentence) for sentence in measured_on(report)]
    if report.disjointness:
        sections.append("\n".join(f"- {escape_markdown(sentence)}" for sentence in disjointness_sentences(report)))
    sections += ["## Honest bits", markdown_table(bits_table(report)), markdown_table(parts_table(report))]
    if report.budget is not None:
        sections += ["## Budget", *(escape_markdown(sentence) for sentence in budget_sentences(report))]
    if report.distillation is not None:
        sections += ["## Distillation", *(escape_markdown(sentence) for sentence in distillation_sentences(report))]
    if report.stages:
        sections += ["## Wall time", markdown_table(stage_table(report))]
    return "\n\n".join(sections) + "\n"
