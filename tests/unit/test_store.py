"""The store: what is in it is whole or found out, and every refusal is one line without secrets."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from rwkvq.errors import OutputError, StoredObjectError, StoreError
from rwkvq.store import LEFTOVER_SECONDS, Store, StoredFile


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "file":
        yield Store(f"file://{tmp_path}/deep/store")
        return
    yield Store("memory://bucket/prefix")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "sent"
    path.write_bytes(b"one, two, three")
    return path


def damage(store: Store, key: str, data: bytes) -> None:
    with store._files.open(store._path(key), "wb") as file:
        file.write(data)


def test_a_file_comes_back_as_it_went(store: Store, path: Path, tmp_path: Path) -> None:
    file = StoredFile.of(path, "name")
    store.send(path, file)
    store.fetch(file, tmp_path / "got" / "name")
    assert (tmp_path / "got" / "name").read_bytes() == path.read_bytes()
    assert store.size(file.key) == len(path.read_bytes())


def test_what_is_there_is_not_sent_again(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StoredFile.of(path, "name")
    store.send(path, file)
    monkeypatch.setattr(store, "put", lambda *_: pytest.fail("sent again"))
    store.send(path, file)


def test_a_truncated_object_is_replaced_when_it_is_sent(store: Store, path: Path, tmp_path: Path) -> None:
    file = StoredFile.of(path, "name")
    store.send(path, file)
    damage(store, file.key, b"one")
    store.send(path, file)
    store.fetch(file, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("data", [b"one, two", b"ONE, two, three"])
def test_a_damaged_object_is_not_taken_and_is_removed(store: Store, path: Path, tmp_path: Path, data: bytes) -> None:
    file = StoredFile.of(path, "name")
    store.send(path, file)
    damage(store, file.key, data)
    with pytest.raises(StoredObjectError, match="damaged, and removed; send it again"):
        store.fetch(file, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    assert store.size(file.key) is None


def test_an_absent_object_is_said(store: Store, path: Path, tmp_path: Path) -> None:
    with pytest.raises(StoredObjectError, match="not in the store; send it again"):
        store.fetch(StoredFile.of(path, "name"), tmp_path / "got")
    assert list(tmp_path.glob(".got*")) == []


def test_a_file_that_is_here_is_kept_and_a_damaged_one_is_fetched_again(
    store: Store, path: Path, tmp_path: Path
) -> None:
    file, target = StoredFile.of(path, "name"), tmp_path / "got"
    store.send(path, file)
    store.fetch(file, target)
    before = target.stat().st_ino
    store.fetch(file, target)
    assert target.stat().st_ino == before
    target.write_bytes(b"ONE, two, three")
    store.fetch(file, target)
    assert target.read_bytes() == path.read_bytes()


def test_a_cut_off_upload_is_never_seen(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StoredFile.of(path, "name")

    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store._files, "mv", cut_off)
    with pytest.raises(KeyboardInterrupt):
        store.send(path, file)
    assert store.size(file.key) is None
    assert store._files.ls(store._path("uploads")) == []


def test_uploads_that_were_cut_off_long_ago_are_removed(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    store.remove_leftovers()  # none so far
    (tmp_path / "uploads").mkdir()
    for name, age in (("old", LEFTOVER_SECONDS + 60), ("new", 0.0)):
        (tmp_path / "uploads" / name).touch()
        os.utime(tmp_path / "uploads" / name, (time.time() - age,) * 2)
    store.remove_leftovers()
    assert [item.name for item in (tmp_path / "uploads").iterdir()] == ["new"]


def test_removing_what_is_not_there_is_no_error(store: Store) -> None:
    store.remove(["objects/1", "results/2"])


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("/mnt/share", "not a URL"),
        ("share", "not a URL"),
        ("nonsense://bucket", "Protocol not known: nonsense"),
        ("sftp://user:hunter2@host/folder", "set it where fsspec looks, such as FSSPEC_SFTP_PASSWORD"),
        ("https://host/folder?token=hunter2", "leave it out"),
    ],
)
def test_an_unusable_url_is_one_line_without_secrets(url: str, found: str) -> None:
    with pytest.raises(StoreError, match=re.escape(found)) as caught:
        Store(url)
    message = str(caught.value)
    assert message.startswith("run.store ") and "\n" not in message and "hunter2" not in message


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(StoreError, match=r"run\.store s3://bucket/prefix: Install s3fs"):
        Store("s3://bucket/prefix")


def test_a_store_that_refuses_is_one_line_with_a_remedy(tmp_path: Path, path: Path) -> None:
    (tmp_path / "file").touch()
    store = Store(f"file://{tmp_path}/file")
    for work in (
        lambda: store.put(path, "objects/1"),
        lambda: store.size("objects/1"),
        lambda: store.remove(["objects/1"]),
    ):
        with pytest.raises(StoreError, match=r"see that the address is right, reachable and writable") as caught:
            work()
        assert "\n" not in str(caught.value)


def test_no_place_to_fetch_to_is_the_fault_of_the_target(store: Store, path: Path, tmp_path: Path) -> None:
    file = StoredFile.of(path, "name")
    store.send(path, file)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        store.fetch(file, tmp_path / "file" / "got")
