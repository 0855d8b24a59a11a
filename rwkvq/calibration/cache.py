"""One file of the activation cache: rows of float activations, one row group a window, every page checksummed.

Columns: window int32, position int32, and x, the C values of a token as fixed-size binary, little-endian: float16, or
float32 where a value is beyond FLOAT16_LIMIT, as the metadata `dtype` says. (A list of C numbers takes five times as
long to write and four times as long to read, for the levels that Parquet gives every number of a list.)
Between Parquet and torch nothing is copied but by the conversion of dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from rwkvq.documents import check_regular
from rwkvq.errors import ActivationError

FORMAT = "rwkvq-activations/2"
FLOAT16_LIMIT = 30_000.0
"""Larger magnitudes are too near the end of float16 (65,504)."""
Kind = Literal["float16", "float32"]
_ARROW: Mapping[Kind, pa.DataType] = {"float16": pa.float16(), "float32": pa.float32()}
_TORCH: Mapping[Kind, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}
_MISMATCH = {
    "model_sha256": "another model",
    "windows_sha256": "other windows",
    "code_version": "another version of this program",
    "rows": "another part of the cache",
}
REMEDY = "run the activations stage again, only damaged or outdated files are rebuilt"


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What the activations of a run follow from: hex SHA-256 of model and windows, and of the code that runs them."""

    model_sha256: str
    windows_sha256: str
    code_version: str


@dataclass(frozen=True, slots=True)
class CacheShape:
    """windows x length tokens, each of `width` values.

    held_out: indices of windows that statistics leave out. has_v_first: the model hands v_first from block to block.
    """

    windows: int
    length: int
    width: int
    held_out: tuple[int, ...]
    has_v_first: bool


class BeyondFloat16Error(Exception):
    """A value is beyond FLOAT16_LIMIT, so the file has to be written as float32. Never leaves this package."""

    def __init__(self, rows: str) -> None:
        super().__init__(rows)
        self.rows = rows


class CacheWriter:
    """Writes a cache file window by window; use as a context manager, with a path that is not final."""

    def __init__(self, path: Path, rows: str, key: CacheKey, shape: CacheShape, kind: Kind) -> None:
        """rows: what a row is ("input of block 3"), checked by readers."""
        self._rows = rows
        self._kind: Kind = kind
        self._next = 0
        self._shape = shape
        metadata = {**asdict(key), "format": FORMAT, "rows": rows, "windows": str(shape.windows)}
        metadata |= {"held_out": " ".join(map(str, shape.held_out)), "has_v_first": str(shape.has_v_first)}
        metadata["dtype"] = kind
        self._tokens = pa.binary(shape.width * _TORCH[kind].itemsize)
        columns = [("window", pa.int32()), ("position", pa.int32()), ("x", self._tokens)]
        self._schema = pa.schema([pa.field(*column, nullable=False) for column in columns], metadata=metadata)
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._writer.close()

    def add(self, x: Tensor) -> None:
        """Append the next windows, x float32 [windows, length, width] on any device.

        Raises BeyondFloat16Error, ActivationError.
        """
        low, high = (value.item() for value in torch.aminmax(x))  # both NaN if any value is
        largest = max(-low, high)
        if not largest < float("inf"):
            found = f"windows {self._next} to {self._next + len(x) - 1} hold values that are not finite"
            raise ActivationError(f"{self._rows}: {found}, the model overflows float32; use an undamaged checkpoint")
        if self._kind == "float16" and largest > FLOAT16_LIMIT:
            raise BeyondFloat16Error(self._rows)
        positions = np.arange(self._shape.length, dtype=np.int32)
        for rows in x.to(_TORCH[self._kind]).cpu().contiguous():
            column = pa.Array.from_buffers(self._tokens, len(rows), [None, pa.py_buffer(rows.numpy())])
            window = pa.array(np.full_like(positions, self._next))
            table = pa.Table.from_arrays([window, pa.array(positions), column], schema=self._schema)
            self._writer.write_table(table, row_group_size=self._shape.length)
            self._next += 1


class CacheReader:
    """An opened cache file; use as a context manager. Every page that is read is checked against its checksum."""

    def __init__(self, path: Path, rows: str) -> None:
        """Raises ActivationError if the file is missing, is no cache file, or holds other rows than `rows`."""
        self.path = path
        with _damage_named(path):
            check_regular(path)
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            schema = self._file.schema_arrow
            self.metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
            if self.metadata.get("format") != FORMAT:
                raise ActivationError(f"{path}: format {self.metadata.get('format')}, expected {FORMAT}; {REMEDY}")
            self.key = CacheKey(*(self.metadata[name] for name in CacheKey.__slots__))
            self.shape = self._read_shape(schema)
            self._compare("rows", self.metadata["rows"], rows)

    def _read_shape(self, schema: pa.Schema) -> CacheShape:
        """Sizes from the file, checked against each other, so that reading can rely on them."""
        column, groups = schema.field("x").type, self._file.metadata.num_row_groups
        kind = self.metadata["dtype"]
        if kind not in _TORCH or not pa.types.is_fixed_size_binary(column) or column.byte_width % _TORCH[kind].itemsize:
            raise ValueError(f"column x is {column} of {kind}")
        self._kind: Kind = kind
        lengths = {self._file.metadata.row_group(index).num_rows for index in range(groups)}
        if len(lengths) != 1 or groups != int(self.metadata["windows"]):
            raise ValueError(f"{groups} windows of {sorted(lengths)} rows, {self.metadata['windows']} windows expected")
        length, width = lengths.pop(), column.byte_width // _TORCH[kind].itemsize
        _check_plain(self.path, self._file.metadata, groups * length * column.byte_width)
        held_out = tuple(int(index) for index in self.metadata["held_out"].split())
        if not all(0 <= index < groups for index in held_out):
            raise ValueError(f"held-out windows {held_out[:3]} of {groups}")
        return CacheShape(groups, length, width, held_out, self.metadata["has_v_first"] == "True")

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(self, *failure: object) -> None:
        self._file.close()

    def expect(self, key: CacheKey) -> None:
        """Raise ActivationError, naming what differs, unless the file was made for `key`."""
        for name, expected in asdict(key).items():
            self._compare(name, self.metadata[name], expected)

    def _compare(self, name: str, found: str, expected: str) -> None:
        if found != expected:
            short = f"{name} {found[:40]}, expected {expected[:40]}"
            raise ActivationError(f"{self.path}: belongs to {_MISMATCH[name]} ({short}); {REMEDY}")

    def read(self, start: int, stop: int) -> Tensor:
        """Windows start .. stop - 1 as float32 [windows, length, width]. Raises ActivationError for a damaged page."""
        width = self.shape.width
        result = torch.empty(stop - start, self.shape.length, width)
        with _damage_named(self.path):
            for window in range(start, stop):
                table = self._file.read_row_group(window, columns=["x"], use_threads=False)
                tokens = table.column("x").combine_chunks()
                if tokens.null_count or len(tokens) != self.shape.length:
                    raise ValueError(f"tokens of window {window} are missing")
                values = pa.Array.from_buffers(
                    _ARROW[self._kind], result[0].numel(), [None, tokens.buffers()[1]], offset=tokens.offset * width
                )
                result[window - start] = from_dlpack(values).view(self.shape.length, width)
        return result

    def check(self) -> None:
        """Read everything; raise ActivationError unless all of it is as it was written."""
        with _damage_named(self.path):
            for window in range(self.shape.windows):
                table = self._file.read_row_group(window, use_threads=False)
                positions = np.arange(self.shape.length, dtype=np.int32)
                table.validate(full=True)
                if not np.array_equal(table.column("position").to_numpy(), positions):
                    raise ValueError(f"positions of window {window}")
                if not (table.column("window").to_numpy() == window).all():
                    raise ValueError(f"number of window {window}")


def _check_plain(path: Path, footer: pq.FileMetaData, needed: int) -> None:
    """Raise ValueError unless the file can hold `needed` bytes of values as they are.

    Only sizes of row groups are asked for: Arrow ends the process when it is asked for a damaged column's description.
    """
    promised = sum(footer.row_group(index).total_byte_size for index in range(footer.num_row_groups))
    if not 0 < needed <= promised <= path.stat().st_size:
        raise ValueError(f"its footer promises {promised} bytes for {needed} of values, more than the file holds")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes Arrow raise into ActivationError."""
    try:
        yield
    except FileNotFoundError as error:
        raise ActivationError(f"{path}: no such file; {REMEDY}") from error
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ActivationError(f"{path}: damaged ({reason}); {REMEDY}") from error
