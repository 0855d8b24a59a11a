"""A family run for other programs: rows for plots and flat figures to compare, both without times."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from rwkvq.report.data import Estimate
from rwkvq.report.family.data import STATES, CellData, FamilyData
from rwkvq.report.family.figures import estimate_in

CSV_COLUMNS = (
    "model",
    "policy",
    "file_mb",
    "matrix_bits",
    "body_bits",
    "file_bits",
    "kl",
    "kl_se",
    "ppl",
    "top1",
    "lambada_acc",
)
_MEASURES = (("ppl", "perplexity"), ("kl", "kl"), ("top1", "top1"), ("lambada_acc", "lambada_accuracy"))


def _text(value: float | None, form: str) -> str:
    """The number, or nothing if there is none or it is not finite: a plot leaves such a point out."""
    return "" if value is None or not math.isfinite(value) else format(value, form)


def _csv_row(cell: CellData) -> tuple[str, ...]:
    assert cell.report is not None
    sizes, kl = cell.report.sizes, cell.kl or Estimate(math.nan)
    others = [estimate_in(cell.quality, key) for key in ("perplexity", "top1", "lambada_accuracy")]
    return (
        cell.model,
        cell.policy,
        f"{sizes.file_bytes / 1e6:.6f}",
        *(_text(bits, ".6f") for bits in (sizes.matrix_bits, sizes.body_bits, sizes.file_bits)),
        _text(kl.value, ".6e"),
        _text(kl.error, ".6e"),
        *(_text(None if item is None else item.value, ".6f") for item in others),
    )


def family_csv(data: FamilyData) -> str:
    """One row a finished cell, columns CSV_COLUMNS: decimal MB, bits per weight, nats; empty = not measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(_csv_row(cell) for cell in data.cells if cell.report is not None)
    return text.getvalue()


def family_metrics(data: FamilyData) -> dict[str, Any]:
    """Flat figures `MODEL.POLICY.MEASURE` and the counts `cells.STATE`: no times, only finite numbers."""
    values: dict[str, Any] = {f"cells.{state.replace(' ', '_')}": len(data.in_state(state)) for state in STATES}
    for cell in data.cells:
        if cell.report is None:
            continue
        sizes = cell.report.sizes
        found: dict[str, float | None] = {
            "file_bytes": sizes.file_bytes,
            "matrix_bits": sizes.matrix_bits,
            "body_bits": sizes.body_bits,
            "file_bits": sizes.file_bits,
        }
        for name, key in _MEASURES:
            estimate = estimate_in(cell.quality, key)
            found[name] = None if estimate is None else estimate.value
            found[f"{name}_se"] = None if estimate is None else estimate.error
        values |= {
            f"{cell.model}.{cell.policy}.{name}": value
            for name, value in found.items()
            if value is not None and math.isfinite(value)
        }
    return values
