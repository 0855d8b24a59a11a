"""Reading calibration text: documents come back unchanged, bad input gives one line."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rwkvq.calibration import texts
from rwkvq.calibration.texts import read_texts, text_hash
from rwkvq.errors import TextError
from rwkvq.files import sha256_of_file


def refused(source: str, base_dir: Path, field: str = "text") -> str:
    with pytest.raises(TextError) as caught:
        read_texts(source, field, base_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\n caf\xc3\xa9 ")
    assert read_texts("a.txt", "text", tmp_path) == ["one\r\ntwo\n\n caf\u00e9 "]


def test_the_hash_of_one_document_is_that_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo")
    assert text_hash(read_texts("a.txt", "text", tmp_path)) == sha256_of_file(path)
    assert text_hash(["ab", "c"]) != text_hash(["a", "bc"])


def test_jsonl_gives_one_document_a_line(tmp_path: Path) -> None:
    rows = [{"body": "first\u2028still first"}, {"body": "second", "other": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert read_texts("a.jsonl", "body", tmp_path) == ["first\u2028still first", "second"]


def test_parquet_gives_one_document_a_row_and_skips_nulls(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read_texts("a.parquet", "text", tmp_path) == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_empty_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert "empty" in refused("a.txt", tmp_path)


def test_empty_jsonl_and_parquet_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert "empty" in refused("a.jsonl", tmp_path)
    assert "empty" in refused("a.parquet", tmp_path)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "No such file" in refused("missing.txt", tmp_path)
    assert "lambada, wikitext" in refused("no-such-data-set", tmp_path)
    (tmp_path / "folder.txt").mkdir()
    assert "cannot be read" in refused("folder.txt", tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"ok \xe9")
    assert "not UTF-8 at byte 3" in refused("latin.txt", tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("3", "line 2 has no object"),
        ('{"body": "x"}', "line 2 has fields 'body', expected text in 'text'"),
        ('{"text": 3}', "line 2 has fields 'text', expected text in 'text'"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    assert expected in refused("a.jsonl", tmp_path)


def test_bad_parquet_names_what_is_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    assert "columns 'body', 'n'" in refused("a.parquet", tmp_path)
    assert "column 'n' is int64" in refused("a.parquet", tmp_path, "n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense")
    assert "cannot be read as Parquet" in refused("b.parquet", tmp_path)


def test_too_large_a_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("abcdef")
    monkeypatch.setattr(texts, "MAX_TEXT_BYTES", 5)
    assert "6 bytes, at most 5" in refused("a.txt", tmp_path)


def test_a_data_set_without_network_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(request: urllib.request.Request, timeout: float) -> None:
        asked.append((request.full_url, timeout))
        raise urllib.error.URLError("no network here")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    message = refused("wikitext", tmp_path)
    # asked once with a time limit, and never handed to the client that retries for half a minute
    assert asked == [("https://hub.invalid", texts.NETWORK_TIMEOUT)]
    assert "no connection to https://hub.invalid" in message
    assert "text file" in message


def test_a_file_named_like_a_data_set_is_not_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "wikitext").write_text("abc")
    assert "neither a .txt" in refused("wikitext", tmp_path)


def test_a_data_set_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_DATASET_CHARACTERS", 4)
    assert texts._up_to_limit(iter(["abc", "de", "f", "g"])) == ["abc", "de"]
