"""A family run in Markdown, for Prefect artifacts and pull requests: the figures, without pictures."""

from __future__ import annotations

from rwkvq.report.family.data import CellData, FamilyData
from rwkvq.report.family.figures import (
    RERUN,
    family_headlines,
    family_sentence,
    kept_sentence,
    measured_sentences,
    reason_of,
)
from rwkvq.report.family.tables import ALIGN, BEST, COLUMNS, ModelRow, model_rows
from rwkvq.report.markdown import escape_markdown


def _line(model: str, row: ModelRow) -> str:
    cells = [escape_markdown(model)]
    for at, text in enumerate(row.texts):
        # the value is stressed, not its standard error
        value, sign, error = escape_markdown(text).partition(" ± ")
        cells.append(f"**{value}**{sign}{error}" if at in row.best else value + sign + error)
    return f"| {' | '.join(cells)} |"


def _table(data: FamilyData) -> str:
    sides = "".join(" ---: |" if side == "r" else " --- |" for side in f"l{ALIGN}")
    lines = [f"| model | {' | '.join(map(escape_markdown, COLUMNS))} |", f"|{sides}"]
    lines += [_line(model, row) for model in data.models for row in model_rows(data.cells_of(model))]
    return "\n".join(lines)


def _failures(data: FamilyData) -> list[str]:
    sections = []
    if failed := data.in_state("failed"):
        lines = [
            f"- **{escape_markdown(cell.name)}**: {_why(cell)} ({escape_markdown(kept_sentence(cell))})"
            for cell in failed
        ]
        sections += ["## Failed", "\n".join(lines)]
    if waiting := data.in_state("not run"):
        lines = [f"- **{escape_markdown(cell.name)}**: {_why(cell)}" for cell in waiting]
        sections += ["## Not run", "\n".join(lines)]
    return [*sections, RERUN] if sections else []


def _why(cell: CellData) -> str:
    return escape_markdown(reason_of(cell))


def family_markdown(data: FamilyData) -> str:
    """The page without pictures and without provenance."""
    cards = []
    for card in family_headlines(data):
        figures = ", ".join(f"{label} {value}" for label, value in card.figures)
        remark = f" ({escape_markdown(card.remark)})" if card.remark else ""
        cards.append(f"- **{escape_markdown(card.title)}**: {escape_markdown(figures)}{remark}")
    sections = [f"# {escape_markdown(data.name)}", escape_markdown(family_sentence(data)), "\n".join(cards)]
    sections += [*_failures(data), "## Models and policies", _table(data), BEST]
    sections += [escape_markdown(text) for text, _ in measured_sentences(data)]
    return "\n\n".join(sections) + "\n"
