"""The figures at the top of the report."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rwkvq.report.data import Estimate, QualityRow, ReportData, Sizes
from rwkvq.report.tables import estimate_cells, estimate_of
from rwkvq.report.text import NONE, percent_text, size_text


@dataclass(frozen=True, slots=True)
class Headline:
    """One figure of the top of the report: labelled values side by side, the last one is ours, and a remark."""

    title: str
    figures: tuple[tuple[str, str], ...]
    remark: str


def _remark(error: str, key: str, other: QualityRow | None, mine: Estimate) -> str:
    """The standard error, and for the two measures with a meaningful ratio how far we are from the other model."""
    theirs = None if other is None else estimate_of(other, key)
    ratio = mine.value / theirs.value if theirs is not None and theirs.value else math.nan
    words = [f"± {error}"] if error else []
    if other is not None and math.isfinite(ratio):
        if key == "perplexity":
            side = "above" if ratio >= 1 else "below"
            words.append(f"{100 * abs(ratio - 1):.1f} % {side} {other.name}")
        if key == "kl":
            words.append(f"{ratio:.2f} × {other.name}")
    return ", ".join(words)


def _card(report: ReportData, key: str, title: str, factor: float = 1) -> Headline | None:
    """Our model beside the float one, or beside the baseline where the float model is the reference itself."""
    ours, other = report.quality_of("quantized"), report.quality_of("float")
    if other is None or estimate_of(other, key) is None:
        other = report.quality_of("baseline")
    mine = None if ours is None else estimate_of(ours, key)
    if ours is None or mine is None:
        return None
    cells = dict(zip(report.quality, estimate_cells(report.quality, key, factor), strict=True))
    figures = [
        (row.name, cells[row].split(" ± ")[0])
        for row in (other, ours)
        if row is not None and estimate_of(row, key) is not None
    ]
    error = cells[ours].partition(" ± ")[2]
    return Headline(title, tuple(figures), _remark(error, key, other, mine))


def _saving(sizes: Sizes) -> str:
    if not sizes.checkpoint_bytes:
        return ""
    saved = 1 - sizes.file_bytes / sizes.checkpoint_bytes
    return f"{percent_text(abs(saved))} {'smaller' if saved >= 0 else 'larger'}"


def headlines(report: ReportData) -> list[Headline]:
    """The figures to read first; those that were not measured are left out."""
    sizes = report.sizes
    bits = (("matrices", sizes.matrix_bits), ("body", sizes.body_bits), ("file", sizes.file_bits))
    cards = [
        Headline(
            "File size",
            (("before", size_text(sizes.checkpoint_bytes)), ("after", size_text(sizes.file_bytes))),
            _saving(sizes),
        ),
        Headline(
            "Bits per weight",
            tuple((name, NONE if value is None else f"{value:.2f}") for name, value in bits),
            "stored, nothing left out",
        ),
        _card(report, "kl", "KL, nats a token"),
        _card(report, "top1", "Top-1 agreement, %", 100),
        _card(report, "perplexity", "Text perplexity"),
        _card(report, "lambada_accuracy", "LAMBADA accuracy, %", 100),
    ]
    return [card for card in cards if card is not None]
