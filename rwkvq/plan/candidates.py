"""The formats that policy `budget` may choose for a weight, and the table of what each would cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rwkvq.checkpoint.names import Weight
from rwkvq.documents import check_regular
from rwkvq.errors import PlanError, ShapeError
from rwkvq.files import atomic_path
from rwkvq.formats import Layout, TableLayout, TrellisLayout
from rwkvq.formats.table import GROUP, MAX_BITS, MIN_BITS
from rwkvq.formats.trellis import MAX_LENGTH, OFFSET_BITS, RATES
from rwkvq.plan.options import Method
from rwkvq.settings import FormatSet

MAX_ROWS = 200_000
"""Rows of a table: about ten for each of two thousand weights."""
_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("candidate", pa.string(), nullable=False),
        pa.field("stored_bits", pa.int64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A format that a weight may get; `label` names it in plans and tables (trellis-3.25-r0-c3: no offsets of rows)."""

    label: str
    layout: Layout
    method: Method


def candidates_of(weight: Weight, state_bits: int) -> tuple[Candidate, ...]:
    """Every format that fits a matrix or LoRA factor [out, in]. Raises PlanError if there is none."""
    rows, columns = weight.shape
    length = math.gcd(rows, MAX_LENGTH)
    found = []
    for rate, row_bits, column_bits in product(RATES, OFFSET_BITS, OFFSET_BITS):
        try:
            layout = TrellisLayout(rows, columns, rate, state_bits, length, row_bits, column_bits)
        except ShapeError:
            continue  # a short sequence does not fill whole bytes, or holds no state
        found.append(Candidate(f"trellis-{rate / 4:g}-r{row_bits}-c{column_bits}", layout, "trellis"))
    for bits in range(MIN_BITS, MAX_BITS + 1):
        if columns % GROUP == 0:
            found.append(Candidate(f"table-{bits}", TableLayout(rows, columns, bits), "table"))
    if not found:
        raise PlanError(
            f"{weight.name}: no format of policy budget fits it ({rows} outputs, {columns} inputs); use another policy"
        )
    return tuple(found)


FAST = ("table", "scalar", "dense")
"""Formats that decode at the speed of memory."""


def allowed(candidates: Iterable[Candidate], formats: FormatSet) -> list[Candidate]:
    """Those of the candidates that a set of formats has."""
    return [item for item in candidates if formats == "quality" or item.layout.format in FAST]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What one candidate of one weight stores, bits, and the KL divergence, nats a token, that it is predicted to cost.

    candidate: its label. The losses of all weights add up (docs/method.md 14).
    """

    name: str
    candidate: str
    stored_bits: int
    loss: float


def write_curves(path: Path, points: Sequence[CurvePoint], metadata: Mapping[str, str]) -> None:
    """Write the table atomically; equal arguments give equal bytes."""
    columns = [[getattr(point, field.name) for point in points] for field in _SCHEMA]
    table = pa.table(columns, schema=_SCHEMA.with_metadata(dict(metadata)))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="none", use_dictionary=False)


def read_curves(path: Path) -> list[CurvePoint]:
    """Read the table. Raises PlanError naming the file."""
    try:
        check_regular(path)
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise ValueError(f"{file.metadata.num_rows} rows, at most {MAX_ROWS} are read")
            if not file.schema_arrow.equals(_SCHEMA):
                raise ValueError("other columns than a table of curves")
            rows: list[dict[str, Any]] = file.read(use_threads=False).to_pylist()
    except FileNotFoundError as error:
        raise PlanError(f"{path}: no such file; run the stage `curves` first") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(f"{path}: no table of curves ({reason}); run the stage `curves` again") from error
    points = [CurvePoint(**row) for row in rows]
    if bad := next((point for point in points if not (point.loss >= 0 and point.stored_bits > 0)), None):
        raise PlanError(
            f"{path}: {bad.name} has loss {bad.loss} at {bad.stored_bits} bits; run the stage `curves` again"
        )
    return points


def by_weight(points: Iterable[CurvePoint]) -> dict[str, dict[str, CurvePoint]]:
    """The points by weight name and candidate label."""
    result: dict[str, dict[str, CurvePoint]] = {}
    for point in points:
        result.setdefault(point.name, {})[point.candidate] = point
    return result
