"""The table `proxies.parquet`: one row a weight, every measure in every gap mode.

Rows do not depend on the decision mode, so a plan can be made with other settings without reading the weights again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from rwkvq.checkpoint.names import Weight, WeightClass, extract
from rwkvq.checkpoint.reader import WeightSource
from rwkvq.documents import check_regular
from rwkvq.errors import CheckpointError, PlanError
from rwkvq.files import atomic_path
from rwkvq.proxies import others
from rwkvq.proxies.coarse import coarse
from rwkvq.proxies.fine import fine
from rwkvq.proxies.gaps import GAP_MODES, Gaps, gaps_of, spectrum
from rwkvq.settings import GapMode, ProxiesSettings

MAX_ROWS = 20_000
"""One a weight that is measured; the largest RWKV has about two thousand."""
MAX_TABLE_BYTES = 64 << 20
MAX_TEXT = 200
_TEXTS = ("name", "class", "dtype")
MEASURED_CLASSES: tuple[WeightClass, ...] = ("matrix", "lora", "elementwise")


@dataclass(frozen=True, slots=True)
class GapMeasures:
    """Measures of one set of gaps: P_c in nats, P_f, and the ablation's measures of G'. All 0 if degenerate."""

    count: int
    p_c: float
    p_f: float
    variance: float
    cv: float
    range: float
    mad: float
    degenerate: bool

    @classmethod
    def of(cls, gaps: Gaps, order: int) -> GapMeasures:
        """Measure `gaps`; `order` is K, the highest moment in P_f."""
        return cls(
            gaps.count,
            coarse(gaps),
            fine(gaps, order=order),
            others.variance(gaps),
            others.coefficient_of_variation(gaps),
            others.value_range(gaps),
            others.mean_absolute_deviation(gaps),
            gaps.is_degenerate,
        )


@dataclass(frozen=True, slots=True)
class Measures:
    """All measures of one weight; one field a gap mode."""

    raw: GapMeasures
    distinct: GapMeasures
    unique: GapMeasures
    quantile: GapMeasures
    max_over_rms: float

    def of_mode(self, mode: GapMode) -> GapMeasures:
        """The measures in one gap mode."""
        found: GapMeasures = getattr(self, mode)
        return found


@dataclass(frozen=True, slots=True)
class Row:
    """One weight: its name, where it belongs, its shape as quantized ([out, in] or [size]), its measures."""

    name: str
    block: int | None
    weight_class: WeightClass
    shape: tuple[int, ...]
    dtype: str
    measures: Measures

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def measure(weight: Tensor, settings: ProxiesSettings) -> Measures:
    """Measure one weight (any shape, any float dtype) in float64. Raises CheckpointError for NaN or infinite values."""
    distribution = spectrum(weight)
    by_mode = {
        mode: GapMeasures.of(gaps_of(distribution, mode, quantiles=settings.quantiles), settings.order)
        for mode in GAP_MODES
    }
    return Measures(
        raw=by_mode["raw"],
        distinct=by_mode["distinct"],
        unique=by_mode["unique"],
        quantile=by_mode["quantile"],
        max_over_rms=others.max_over_rms(distribution),
    )


def measure_block(source: WeightSource, weights: Sequence[Weight], settings: ProxiesSettings) -> list[Row]:
    """Measure the weights of one block (or any others) that a format may be chosen for; the rest get no row.

    Reads each checkpoint tensor once. Raises CheckpointError naming the tensor for NaN or infinite values.
    """
    rows = []
    wanted = [weight for weight in weights if weight.weight_class in MEASURED_CLASSES]
    for tensor_name, parts in groupby(wanted, key=lambda weight: weight.tensor):
        tensor = source.tensor(tensor_name)
        for weight in parts:
            try:
                measures = measure(extract(tensor, weight), settings)
            except CheckpointError as error:
                raise CheckpointError(f"{source.path}: {weight.name}: {error}") from error
            dtype = str(tensor.dtype).removeprefix("torch.")
            rows.append(Row(weight.name, weight.block, weight.weight_class, weight.shape, dtype, measures))
    return rows


_GAP_TYPES: dict[str, pa.DataType] = {
    field.name: {"count": pa.int64(), "degenerate": pa.bool_()}.get(field.name, pa.float64())
    for field in fields(GapMeasures)
}

SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("block", pa.int32()),
        pa.field("class", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("numel", pa.int64(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("max_over_rms", pa.float64(), nullable=False),
        *(pa.field(f"{name}_{mode}", kind, nullable=False) for mode in GAP_MODES for name, kind in _GAP_TYPES.items()),
    ]
)
"""Columns of proxies.parquet; `p_c_unique` is P_c in gap mode `unique`, and so on."""


def _to_record(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": row.name,
        "block": row.block,
        "class": row.weight_class,
        "shape": list(row.shape),
        "numel": row.numel,
        "dtype": row.dtype,
        "max_over_rms": row.measures.max_over_rms,
    }
    for mode in GAP_MODES:
        record |= {f"{name}_{mode}": value for name, value in asdict(row.measures.of_mode(mode)).items()}
    return record


def _from_record(record: Mapping[str, Any]) -> Row:
    by_mode = {mode: GapMeasures(**{name: record[f"{name}_{mode}"] for name in _GAP_TYPES}) for mode in GAP_MODES}
    return Row(
        name=record["name"],
        block=record["block"],
        weight_class=record["class"],
        shape=tuple(record["shape"]),
        dtype=record["dtype"],
        measures=Measures(**by_mode, max_over_rms=record["max_over_rms"]),
    )


def write(path: Path, rows: Sequence[Row], metadata: Mapping[str, str]) -> None:
    """Write the table atomically; `metadata` (hashes, settings) goes into the schema. Equal rows give equal bytes."""
    schema = SCHEMA.with_metadata(dict(metadata))
    table = pa.Table.from_pylist([_to_record(row) for row in rows], schema=schema)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def read(path: Path) -> list[Row]:
    """Read the table. Raises PlanError if it is missing, damaged or has other columns."""
    try:
        check_regular(path)
        # ParquetFile reads this one file; read_table would treat the path as a data set
        if not pq.read_schema(path).equals(SCHEMA):
            raise ValueError("its columns are not those of a table of proxies")
        with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=list(_TEXTS)) as file:
            _check_footer(file.metadata)
            table = file.read(use_threads=False)
        table.validate(full=True)
        # one long text, repeated by reference, would fill the memory as rows
        texts = [
            text for name in _TEXTS for chunk in table.column(name).chunks for text in chunk.dictionary.to_pylist()
        ]
        if any(len(text) > MAX_TEXT for text in texts):
            raise ValueError("a text in it is too long")
        rows = [_from_record(record) for record in table.to_pylist()]
        if any(row.weight_class not in MEASURED_CLASSES or not row.shape for row in rows):
            raise ValueError("a row is of no weight")
        return rows
    except (OSError, pa.ArrowException, ValueError, TypeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(f"{path}: not a readable table of proxies ({reason}); run the stage `proxies` again") from error


def _check_footer(footer: pq.FileMetaData) -> None:
    """Raise ValueError for a table that would be much larger in memory than any model's."""
    if footer.num_rows > MAX_ROWS:
        raise ValueError(f"{footer.num_rows} rows, at most {MAX_ROWS} are read")
    # sizes of row groups alone: Arrow ends the process when it is asked for a damaged column's description
    if sum(footer.row_group(index).total_byte_size for index in range(footer.num_row_groups)) > MAX_TABLE_BYTES:
        raise ValueError(f"its values take more than {MAX_TABLE_BYTES} bytes")
