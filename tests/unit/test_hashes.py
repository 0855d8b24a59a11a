"""Remembered hashes of large files: known again by size, times and inode, and by nothing less."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from rwkvq import hashes
from rwkvq.hashes import cache_file, file_hash

OLD = 1_600_000_000_000_000_000


@pytest.fixture(autouse=True)
def small_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKVQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE", 1000)
    # a file's change time cannot be set back, so the files of a test are always young
    monkeypatch.setattr(hashes, "_SETTLED_NS", -(10**12))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read."""
    seen: list[Path] = []
    read = hashes.sha256_of_file
    monkeypatch.setattr(hashes, "sha256_of_file", lambda path: (seen.append(path), read(path))[1])
    return seen


def write(path: Path, data: bytes = b"a" * 2000) -> Path:
    path.write_bytes(data)
    return path


def test_a_large_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    path = write(tmp_path / "model.pth")
    assert file_hash(path) == file_hash(path) == hashlib.sha256(b"a" * 2000).hexdigest()
    assert reads == [path]


def test_a_small_file_is_read_each_time(tmp_path: Path, reads: list[Path]) -> None:
    path = write(tmp_path / "model.pth", b"a" * 999)
    assert file_hash(path) == file_hash(path)
    assert len(reads) == 2 and not cache_file().exists()


@pytest.mark.parametrize("change", ["size", "modified", "changed", "inode"])
def test_a_file_that_differs_in_anything_is_read_again(tmp_path: Path, reads: list[Path], change: str) -> None:
    path = write(tmp_path / "model.pth")
    os.utime(path, ns=(OLD, OLD))
    before = file_hash(path)
    if change == "size":
        write(path, b"a" * 2001)
        os.utime(path, ns=(OLD, OLD))
    elif change == "modified":
        write(path, b"b" * 2000)
    elif change == "changed":  # the bytes differ under the same modification time
        write(path, b"b" * 2000)
        os.utime(path, ns=(OLD, OLD))
    else:
        os.utime(write(tmp_path / "other", b"b" * 2000), ns=(OLD, OLD))
        os.replace(tmp_path / "other", path)
    assert file_hash(path) != before
    assert len(reads) == 2


def test_a_file_that_was_just_written_is_not_remembered(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_SETTLED_NS", 10**12)
    path = write(tmp_path / "model.pth")
    assert file_hash(path) == file_hash(path)
    assert len(reads) == 2


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"files": 3}', '{"files": {"PATH": 3}}', '{"files": {"PATH": {}}}']
)
def test_a_damaged_memory_is_no_memory(tmp_path: Path, reads: list[Path], content: str) -> None:
    path = write(tmp_path / "model.pth")
    cache_file().parent.mkdir()
    cache_file().write_text(content.replace("PATH", str(path)))
    assert file_hash(path) == hashlib.sha256(b"a" * 2000).hexdigest()
    assert len(reads) == 1
    assert str(path) in json.loads(cache_file().read_text())["files"]


def test_a_memory_that_cannot_be_written_costs_a_read_and_nothing_else(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RWKVQ_CACHE", str(write(tmp_path / "file") / "cache"))
    path = write(tmp_path / "model.pth")
    assert file_hash(path) == file_hash(path)
    assert len(reads) == 2


def test_the_oldest_entries_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_MAX_ENTRIES", 2)
    for name in "abc":
        file_hash(write(tmp_path / name))
    assert [Path(name).name for name in json.loads(cache_file().read_text())["files"]] == ["b", "c"]


def test_the_memory_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RWKVQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "rwkvq" / "hashes.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache" / "rwkvq" / "hashes.json"
