"""Calibration windows: what is cut, what is chosen, what is refused, and the file."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rwkvq.calibration.windows import Windows, build_windows, model_inputs, read_windows, write_windows
from rwkvq.errors import TextError, TokenizerError
from rwkvq.settings import WindowsSettings
from tests.tiny import write_byte_vocabulary

TEXT = "".join(chr(97 + (index * index) % 26) for index in range(403))


def settings(**values: object) -> WindowsSettings:
    return WindowsSettings(
        **{"source": "a.txt", "tokenizer": "bytes.txt", "samples": 6, "length": 16, "held_out": 3} | values
    )


def build(folder: Path, *, seed: int = 0, vocab: int = 320, **values: object) -> Windows:
    write_byte_vocabulary(folder / "bytes.txt")
    if not (folder / "a.txt").exists():
        (folder / "a.txt").write_text(TEXT)
    return build_windows(settings(**values), seed=seed, vocab=vocab, base_dir=folder)


def test_windows_are_consecutive_cuts_of_the_whole_text(tmp_path: Path) -> None:
    windows = build(tmp_path)
    tokens = [byte + 1 for byte in TEXT.encode()]
    assert windows.ids.shape == (9, 16)
    assert windows.ids.dtype == np.int32
    for ids, offset in zip(windows.ids.tolist(), windows.offsets.tolist(), strict=True):
        assert offset % 16 == 0
        assert ids == tokens[offset : offset + 16]
    assert len(set(windows.offsets.tolist())) == 9
    assert windows.offsets.tolist() == sorted(windows.offsets.tolist())
    assert windows.held_out.sum() == 3


def test_hashes_are_those_of_little_endian_ids(tmp_path: Path) -> None:
    windows = build(tmp_path)
    first = struct.pack("<16i", *windows.ids[0].tolist())
    assert windows.hashes[0] == hashlib.sha256(first).hexdigest()


def test_the_seed_chooses(tmp_path: Path) -> None:
    first, again, other = build(tmp_path), build(tmp_path), build(tmp_path, seed=1)
    assert first.identity() == again.identity()
    assert first.offsets.tolist() != other.offsets.tolist()
    assert first.identity() != other.identity()


def test_held_out_windows_change_no_sample(tmp_path: Path) -> None:
    few, many = build(tmp_path, held_out=0), build(tmp_path, held_out=9)
    assert few.offsets.tolist() == many.offsets[~many.held_out].tolist()
    assert many.held_out.sum() == 9


def test_identity_tells_samples_from_held_out(tmp_path: Path) -> None:
    assert build(tmp_path, samples=6, held_out=3).identity() != build(tmp_path, samples=9, held_out=0).identity()


def test_all_windows_of_the_text_can_be_used(tmp_path: Path) -> None:
    windows = build(tmp_path, samples=25, held_out=0)
    assert windows.offsets.tolist() == list(range(0, 400, 16))


def test_too_few_tokens_says_found_and_needed(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"a\.txt: 403 tokens, 416 needed for 23 \+ 3 windows of 16") as caught:
        build(tmp_path, samples=23)
    assert "\n" not in str(caught.value)


def test_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    write_byte_vocabulary(tmp_path / "bytes.txt")
    with pytest.raises(TextError, match="empty"):
        build_windows(settings(), seed=0, vocab=320, base_dir=tmp_path)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    highest = max(TEXT.encode()) + 1
    assert build(tmp_path, vocab=highest + 1).ids.max() <= highest
    with pytest.raises(TokenizerError, match=rf"bytes\.txt: gives token {highest}, the model knows 0 to {highest - 1}"):
        build(tmp_path, vocab=highest)


def test_documents_are_parted_by_token_zero(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n{"text": "fghij"}\n')
    windows = build(tmp_path, source="a.jsonl", samples=3, held_out=0, length=4)
    assert windows.ids.reshape(-1).tolist() == [98, 99, 100, 0, 101, 102, 0, 103, 104, 105, 106, 107]


def test_the_model_reads_zero_then_all_but_the_last() -> None:
    ids = np.array([[5, 6, 7], [8, 9, 10]], np.int32)
    assert model_inputs(ids).tolist() == [[0, 5, 6], [0, 8, 9]]
    assert ids.tolist() == [[5, 6, 7], [8, 9, 10]]


def test_the_file_gives_the_windows_back(tmp_path: Path) -> None:
    windows, path = build(tmp_path), tmp_path / "run" / "windows.parquet"
    write_windows(windows, path)
    read = read_windows(path)
    assert read.identity() == windows.identity()
    for name in ("ids", "offsets", "held_out"):
        assert np.array_equal(getattr(read, name), getattr(windows, name))
        assert getattr(read, name).dtype == getattr(windows, name).dtype
    for name in ("hashes", "source", "tokenizer_sha256", "text_sha256", "seed"):
        assert getattr(read, name) == getattr(windows, name)


def test_the_file_is_the_same_bytes_twice_and_has_the_documented_columns(tmp_path: Path) -> None:
    windows = build(tmp_path)
    paths = [tmp_path / "1.parquet", tmp_path / "2.parquet"]
    for path in paths:
        write_windows(windows, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    schema = pq.read_schema(paths[0])
    kinds = {field.name: str(field.type) for field in schema}
    assert kinds["ids"].startswith("fixed_size_list<")
    assert kinds["ids"].endswith("int32>[16]")
    assert [kinds[name] for name in ("window", "offset", "held_out")] == ["int32", "int64", "bool"]


def test_an_edited_window_is_found(tmp_path: Path) -> None:
    windows, path = build(tmp_path), tmp_path / "windows.parquet"
    windows.ids[4, 7] ^= 1
    write_windows(windows, path)
    with pytest.raises(TextError, match="ids do not match their hashes"):
        read_windows(path)


@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_a_damaged_file_is_one_line_with_the_remedy(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "windows.parquet"
    write_windows(build(tmp_path), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TextError, match="run the windows stage again") as caught:
        read_windows(path)
    assert "\n" not in str(caught.value)


def test_other_parquet_files_and_missing_files_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(TextError, match="format None"):
        read_windows(tmp_path / "other.parquet")
    with pytest.raises(TextError, match="no such file"):
        read_windows(tmp_path / "missing.parquet")
