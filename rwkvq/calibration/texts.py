"""Calibration text as documents: from a text file, a JSONL field, a Parquet column, or a named data set."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rwkvq.documents import check_regular
from rwkvq.errors import TextError
from rwkvq.files import sha256_of_bytes

MAX_TEXT_BYTES = 1 << 30
"""A larger file is refused: the text is tokenised as a whole, in memory."""
MAX_DATASET_CHARACTERS = 1 << 25
"""A named data set is read up to this many characters, far more than calibration needs."""
NETWORK_TIMEOUT = 5.0
"""Seconds to wait for the hub before giving up; its own client retries for half a minute."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set on the Hugging Face hub; `rows_are_documents` False = rows are lines of one running text."""

    repository: str
    configuration: str
    split: str
    column: str
    rows_are_documents: bool


DATASETS = {
    # the training novels: the test part, which EleutherAI/lambada_openai holds too, is what models are evaluated on
    "lambada": Dataset("cimec/lambada", "plain_text", "train", "text", rows_are_documents=True),
    "wikitext": Dataset("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", rows_are_documents=False),
}


def read_texts(source: str, field: str, base_dir: Path) -> list[str]:
    """The documents of `source`: at least one character that is not white space, nothing changed or stripped.

    source: a .txt (one document, line ends kept), .jsonl (`field` of each line) or .parquet file (column `field`),
    relative to base_dir, or a name in DATASETS. Raises TextError: no such file or name, not readable as what its
    ending says, empty, larger than MAX_TEXT_BYTES, no network.
    """
    path = base_dir / source
    readers: dict[str, Callable[[], list[str]]] = {
        ".txt": lambda: [_read_utf8(path)],
        ".jsonl": lambda: _read_jsonl(path, field),
        ".parquet": lambda: _read_parquet(path, field),
    }
    if source in DATASETS and not path.exists():
        documents = _read_dataset(source)
    elif path.suffix.lower() in readers:
        _check_size(path)
        documents = readers[path.suffix.lower()]()
    else:
        known = ", ".join(DATASETS)
        raise TextError(f"{source}: neither a .txt, .jsonl or .parquet file nor one of {known}; choose one of these")
    if not any(document.strip() for document in documents):
        raise TextError(f"{source}: the text is empty; choose another file")
    return documents


def text_hash(documents: Iterable[str]) -> str:
    """Hex SHA-256 of the documents in UTF-8 with a zero byte between two; for one document that of its file."""
    return sha256_of_bytes("\0".join(documents).encode("utf-8"))


def _check_size(path: Path) -> None:
    try:
        check_regular(path)
        size = path.stat().st_size
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise TextError(f"{path}: cannot be read ({error}); name a text file") from error
    if size > MAX_TEXT_BYTES:
        raise TextError(f"{path}: {size} bytes, at most {MAX_TEXT_BYTES} are read; cut a part of it for calibration")


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error


def _read_jsonl(path: Path, field: str) -> list[str]:
    documents = []
    # only \n ends a line: splitlines() would also cut at the line separators that JSON strings may hold
    for number, line in enumerate(_read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"{path}: line {number} is not JSON; every line must be one JSON object") from error
        document = row.get(field) if isinstance(row, dict) else None
        if not isinstance(document, str):
            found = f"fields {', '.join(map(repr, row))[:200]}" if isinstance(row, dict) else "no object"
            raise TextError(f"{path}: line {number} has {found}, expected text in {field!r}; set windows.field")
        documents.append(document)
    return documents


def _read_parquet(path: Path, field: str) -> list[str]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                found = ", ".join(map(repr, schema.names))[:200]
                raise TextError(f"{path}: has columns {found}, expected text in {field!r}; set windows.field")
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise TextError(f"{path}: column {field!r} is {kind}, expected text; set windows.field")
        # as a dictionary, so that a text that is repeated by reference is in memory once
        with pq.ParquetFile(path, read_dictionary=[field]) as file:
            _check_unpacked(path, file.metadata, schema.names.index(field))
            column = file.read(columns=[field]).column(field)
        _check_unfolded(path, column)
        return [document for document in column.to_pylist() if document is not None]
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise TextError(f"{path}: cannot be read as Parquet ({_first_line(error)}); check the file") from error


def _check_unpacked(path: Path, footer: pq.FileMetaData, column: int) -> None:
    """Raise TextError if the column is larger than a text may be once it is decompressed."""
    groups = [footer.row_group(index).column(column) for index in range(footer.num_row_groups)]
    size = sum(group.total_uncompressed_size for group in groups)
    _check_total(path, size)


def _check_unfolded(path: Path, column: pa.ChunkedArray) -> None:
    """Raise TextError if the documents together are larger than a text may be."""
    size = 0
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            size += pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
        else:
            size += chunk.nbytes
    _check_total(path, size)


def _check_total(path: Path, size: int) -> None:
    if size > MAX_TEXT_BYTES:
        raise TextError(f"{path}: {size} bytes unpacked, at most {MAX_TEXT_BYTES} are read; cut a part of it")


def _read_dataset(name: str) -> list[str]:
    """Documents of a named data set. Raises TextError without network, without `datasets`, or if the hub refuses."""
    dataset = DATASETS[name]
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("", "0", "false", "no", "off"):
        _require_network(name)
    try:
        import datasets
    except ImportError as error:
        raise TextError(f"{name}: needs the package `datasets`; install it or use a text file") from error
    try:
        rows = datasets.load_dataset(dataset.repository, dataset.configuration, split=dataset.split)
        documents = _up_to_limit(row[dataset.column] for row in rows)
    except Exception as error:  # `datasets` raises what its many back ends raise
        where = f"{dataset.repository} cannot be loaded ({_first_line(error)})"
        raise TextError(f"{name}: {where}; check the network or use a text file") from error
    return documents if dataset.rows_are_documents else ["".join(documents)]


def _require_network(name: str) -> None:
    """Raise TextError at once if the hub does not answer."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=NETWORK_TIMEOUT).close()
    except urllib.error.HTTPError:
        return  # an answer, whatever it says
    except (OSError, ValueError) as error:
        advice = "use a text file, or set HF_HUB_OFFLINE=1 if the data set is in the local cache"
        raise TextError(f"{name}: no connection to {hub} ({_first_line(error)}); {advice}") from error


def _up_to_limit(documents: Iterable[str]) -> list[str]:
    total = 0

    def is_wanted(document: str) -> bool:
        nonlocal total
        total += len(document)
        return total - len(document) < MAX_DATASET_CHARACTERS

    return list(takewhile(is_wanted, documents))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
