"""Calibration windows: fixed-length runs of tokens, chosen by seed from a text, hashed, in Parquet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rwkvq.calibration.texts import read_texts, text_hash
from rwkvq.documents import check_regular
from rwkvq.errors import TextError, TokenizerError
from rwkvq.files import atomic_path, sha256_of_bytes, sha256_of_file
from rwkvq.models.tokenizer import load_tokenizer
from rwkvq.settings import WindowsSettings

FORMAT = "rwkvq-windows/1"
SEPARATOR = 0
"""The token between two documents and before each window; the released models were trained with it so."""

MAX_TOKENS = 1 << 25
"""Of all windows of a file together: what is read is held in memory as a whole."""
MAX_WINDOWS = 1 << 20
_COLUMNS = {"offset": pa.int64(), "held_out": pa.bool_(), "sha256": pa.dictionary(pa.int32(), pa.string())}
"""What is read beside the ids; `sha256` in the form that it is read in."""

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Windows of one length, cut from one text without overlap, in the order of the text.

    ids int32 [count, length]; offsets int64 [count]: first token of each in the tokenised text; held_out bool [count]:
    windows that no statistic uses; hashes: hex SHA-256 of each window's ids as little-endian int32. source: as given
    in the settings. tokenizer_sha256, text_sha256: of what the windows were made from.
    """

    ids: Ids
    offsets: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    hashes: tuple[str, ...]
    source: str
    tokenizer_sha256: str
    text_sha256: str
    seed: int

    def identity(self) -> str:
        """Hex SHA-256 of the windows and of which of them are held out."""
        flags = [f"{digest} {int(is_out)}" for digest, is_out in zip(self.hashes, self.held_out, strict=True)]
        return sha256_of_bytes("\n".join([FORMAT, *flags]).encode())


def build_windows(settings: WindowsSettings, *, seed: int, vocab: int, base_dir: Path = Path()) -> Windows:
    """Tokenise the whole text, cut it into consecutive windows, choose `samples` + `held_out` of them by seed.

    vocab: entries of the model's vocabulary. Paths in settings are relative to base_dir. The chosen samples do not
    depend on `held_out`. Raises TextError (also when tokens are too few), TokenizerError.
    """
    documents = read_texts(settings.source, settings.field, base_dir)
    tokenizer_path = base_dir / settings.tokenizer
    tokens = _tokenise(documents, tokenizer_path, vocab)
    wanted, length = settings.samples + settings.held_out, settings.length
    total = len(tokens) // length
    if total < wanted:
        raise TextError(
            f"{settings.source}: {len(tokens)} tokens, {wanted * length} needed for {settings.samples} + "
            f"{settings.held_out} windows of {length}; use a longer text or fewer or shorter windows"
        )
    order = _shuffled(total, seed)
    is_held_out = dict.fromkeys(order[: settings.samples], False) | dict.fromkeys(
        order[settings.samples : wanted], True
    )
    chosen = np.array(sorted(is_held_out), np.int64)
    ids = tokens[: total * length].reshape(total, length)[chosen]
    return Windows(
        ids=ids,
        offsets=chosen * length,
        held_out=np.array([is_held_out[index] for index in chosen.tolist()]),
        hashes=_hashes(ids),
        source=settings.source,
        tokenizer_sha256=sha256_of_file(tokenizer_path),
        text_sha256=text_hash(documents),
        seed=seed,
    )


def _tokenise(documents: list[str], tokenizer_path: Path, vocab: int) -> Ids:
    """All documents as one run of tokens, SEPARATOR between two."""
    tokenizer = load_tokenizer(tokenizer_path)
    separator = np.array([SEPARATOR], np.int64)
    parts = [part for text in documents for part in (separator, np.array(tokenizer.encode(text), np.int64))]
    tokens = np.concatenate(parts[1:])
    if len(tokens) and (highest := int(tokens.max())) >= vocab:
        raise TokenizerError(
            f"{tokenizer_path}: gives token {highest}, the model knows 0 to {vocab - 1}; "
            "use the tokenizer that the model was trained with"
        )
    return tokens.astype(np.int32)


def _shuffled(total: int, seed: int) -> list[int]:
    """0 .. total - 1 in an order that depends on the seed alone, not on the version of a random generator."""

    def key(index: int) -> bytes:
        return hashlib.sha256(f"windows {seed} {index}".encode()).digest()

    return sorted(range(total), key=key)


def _hashes(ids: Ids) -> tuple[str, ...]:
    return tuple(sha256_of_bytes(row.astype("<i4").tobytes()) for row in ids)


def model_inputs(ids: Ids) -> Ids:
    """What the model reads to predict each window [count, length]: SEPARATOR, then all of its tokens but the last."""
    inputs = np.roll(ids, 1, axis=1)
    inputs[:, 0] = SEPARATOR
    return inputs


def write_windows(windows: Windows, path: Path) -> None:
    """Write windows.parquet atomically, one row a window; equal windows give equal bytes. Raises OutputError."""
    count, length = windows.ids.shape
    columns = {
        "window": pa.array(np.arange(count, dtype=np.int32)),
        "offset": pa.array(windows.offsets),
        "held_out": pa.array(windows.held_out),
        "source": pa.array([windows.source] * count),
        "sha256": pa.array(windows.hashes),
        "ids": pa.FixedSizeListArray.from_arrays(pa.array(windows.ids.reshape(-1)), length),
    }
    metadata = {
        "format": FORMAT,
        "source": windows.source,
        "tokenizer_sha256": windows.tokenizer_sha256,
        "text_sha256": windows.text_sha256,
        "seed": str(windows.seed),
    }
    with atomic_path(path) as temporary:
        table = pa.table(columns).replace_schema_metadata(metadata)
        pq.write_table(table, temporary, compression="none", write_page_checksum=True)


def _read_table(path: Path) -> pa.Table:
    """The rows, once the footer says that they have the columns and at most the size that a file of windows has."""
    with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=["sha256"]) as file:
        schema, footer = file.schema_arrow, file.metadata
        length = schema.field("ids").type.list_size
        found = {name: schema.field(name).type for name in _COLUMNS} | {"ids": schema.field("ids").type}
        if found != _COLUMNS | {"ids": pa.list_(pa.field("element", pa.int32()), length)}:
            raise ValueError("its columns are not those of windows")
        if footer.num_rows > MAX_WINDOWS or not 0 < footer.num_rows * length <= MAX_TOKENS:
            raise ValueError(f"{footer.num_rows} windows of {length} tokens, at most {MAX_TOKENS} tokens are read")
        groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > path.stat().st_size:
            raise ValueError("it is compressed")
        table = file.read([*found], use_threads=False)
    if any(column.null_count for column in table.columns):
        raise ValueError("values are missing")
    # one long text, repeated by reference, would fill the memory as a list
    if any(len(digest) != 64 for chunk in table.column("sha256").chunks for digest in chunk.dictionary.to_pylist()):
        raise ValueError("sha256 holds other text")
    return table


def read_windows(path: Path) -> Windows:
    """Read what write_windows wrote and check every window against its hash. Raises TextError."""
    remedy = "run the windows stage again"
    try:
        check_regular(path)
        metadata = {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}
        if metadata.get("format") != FORMAT:
            raise TextError(f"{path}: format {metadata.get('format')}, expected {FORMAT}; {remedy}")
        table = _read_table(path)
        ids = table.column("ids").combine_chunks()
        windows = Windows(
            ids=ids.flatten().to_numpy().reshape(len(ids), ids.type.list_size).copy(),
            offsets=table.column("offset").to_numpy().copy(),
            held_out=table.column("held_out").to_numpy().copy(),
            hashes=tuple(table.column("sha256").to_pylist()),
            source=metadata["source"],
            tokenizer_sha256=metadata["tokenizer_sha256"],
            text_sha256=metadata["text_sha256"],
            seed=int(metadata["seed"]),
        )
    except FileNotFoundError as error:
        raise TextError(f"{path}: no such file; {remedy}") from error
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise TextError(f"{path}: damaged ({reason}); {remedy}") from error
    if _hashes(windows.ids) != windows.hashes:
        raise TextError(f"{path}: damaged (ids do not match their hashes); {remedy}")
    return windows
