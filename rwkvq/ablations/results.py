"""Rows of results and the Parquet table that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rwkvq.documents import check_regular
from rwkvq.errors import EvaluationError
from rwkvq.files import atomic_path

MAX_ROWS = 1_000_000
KEY = b"key"


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One case of one experiment on one model and seed.

    setting: label of the case, unique in its experiment; parameters: what the experiment varies; text: what was
    measured on (cases.Text, or `none`), tokens of it. matrix_bits, body_bits: stored bits a weight; sq_share: by
    weights of the matrices. kl, kl_se (standard error over windows), kl_p99, nll: nats a token; window_kl: means of
    the windows; top1: share of tokens; word_logprobs: nats of every last word of LAMBADA; figures: what only this
    experiment measures.
    """

    experiment: str
    model: str
    seed: int
    setting: str
    parameters: Mapping[str, Any]
    text: str = "none"
    tokens: int = 0
    matrix_bits: float | None = None
    body_bits: float | None = None
    sq_share: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    kl_p99: float | None = None
    nll: float | None = None
    ppl: float | None = None
    top1: float | None = None
    kl_by_position: tuple[float, ...] = ()
    window_kl: tuple[float, ...] = ()
    word_logprobs: tuple[float, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)

    def figure(self, name: str) -> float:
        """A figure of this experiment."""
        return float(self.figures[name])


_TYPES = {
    "seed": pa.int64(),
    "tokens": pa.int64(),
    "kl_by_position": pa.list_(pa.float64()),
    "window_kl": pa.list_(pa.float64()),
    "word_logprobs": pa.list_(pa.float64()),
    **dict.fromkeys(
        ("matrix_bits", "body_bits", "sq_share", "kl", "kl_se", "kl_p99", "nll", "ppl", "top1"), pa.float64()
    ),
}
SCHEMA = pa.schema([pa.field(item.name, _TYPES.get(item.name, pa.string())) for item in fields(ResultRow)])
"""parameters and figures are JSON texts with sorted keys."""


def write_rows(path: Path, rows: Iterable[ResultRow], key: str = "") -> None:
    """Write rows atomically; equal rows give equal bytes. key: hash of all that they were made from."""
    records = []
    for row in rows:
        record = asdict(row)
        texts = {name: json.dumps(record[name], sort_keys=True) for name in ("parameters", "figures")}
        records.append(record | texts)
    table = pa.Table.from_pylist(records, schema=SCHEMA.with_metadata({KEY: key.encode()}))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_rows(path: Path) -> list[ResultRow]:
    """Read what write_rows wrote. Raises EvaluationError naming the file."""
    try:
        check_regular(path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise ValueError("its columns are not those of results")
            if file.metadata.num_rows > MAX_ROWS:
                raise ValueError(f"{file.metadata.num_rows} rows, at most {MAX_ROWS} are read")
            records = file.read(use_threads=False).to_pylist()
        return [_row(record) for record in records]
    except (OSError, pa.ArrowException, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvaluationError(f"{path}: not a readable table of results ({reason}); delete it and run again") from error


def _row(record: Mapping[str, Any]) -> ResultRow:
    texts = {name: json.loads(record[name]) for name in ("parameters", "figures")}
    lists = {name: tuple(record[name]) for name in ("kl_by_position", "window_kl", "word_logprobs")}
    return ResultRow(**{**record, **texts, **lists})


def key_of(path: Path) -> str | None:
    """The key that rows were written with, or None if there are none that can be read."""
    try:
        check_regular(path)
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException, ValueError):
        return None
    found = metadata.get(KEY)
    return None if found is None else found.decode()


def of_experiment(rows: Sequence[ResultRow], key: str) -> list[ResultRow]:
    """The rows of one experiment, in order."""
    return [row for row in rows if row.experiment == key]
