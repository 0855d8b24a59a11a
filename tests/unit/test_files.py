from __future__ import annotations

import os
from pathlib import Path

import pytest

from rwkvq.errors import OutputError
from rwkvq.files import (
    atomic_folder,
    atomic_path,
    canonical_json,
    check_can_create,
    recover_folder,
    remove_leftovers,
    run_lock,
    write_bytes,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_no_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_an_existing_folder_is_kept_unless_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(OutputError, match="--overwrite"), atomic_folder(target, overwrite=False):
        pass
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True):
        raise RuntimeError
    assert (target / "old").exists()
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").touch()
    assert [item.name for item in target.iterdir()] == ["new"]
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("deep/.x.12345678.tmp", "deep/x", "deep/.mine.tmp", "deep/.x.notahexa.tmp"):
        (tmp_path / name).touch()
    for name in (".artifact.0123abcd.tmp", ".artifact.0123abcd.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".y.12345678.tmp").touch()
    remove_leftovers(tmp_path)
    kept = ["deep", "deep/.mine.tmp", "deep/.x.notahexa.tmp", "deep/x"]
    assert sorted(str(item.relative_to(tmp_path)) for item in tmp_path.rglob("*")) == kept


def test_a_folder_that_a_kill_left_moved_away_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "out[1]"
    for name in (".out[1].0123abcd.tmp", ".out[1].0123abcd.old", ".out[1].b.0123abcd.tmp", ".out1.0123abcd.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    recover_folder(target)
    others = [".out1.0123abcd.tmp", ".out[1].b.0123abcd.tmp"]  # of other folders
    assert sorted(item.name for item in tmp_path.iterdir()) == [*others, "out[1]"]
    assert (target / ".out[1].0123abcd.old").exists()
    (tmp_path / ".out[1].fedcba98.old").mkdir()
    recover_folder(target)
    assert sorted(item.name for item in tmp_path.iterdir()) == [*others, "out[1]"]
    assert (target / ".out[1].0123abcd.old").exists()


def test_a_place_that_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    check_can_create(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        check_can_create(tmp_path / "file" / "a")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_second_run_on_one_folder_is_refused(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(OutputError, match="another run"), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("number", ["ENOSPC", "EACCES", "EROFS"])
def test_refusals_of_the_system_become_one_line(tmp_path: Path, number: str) -> None:
    import errno

    with pytest.raises(OutputError) as caught, atomic_path(tmp_path / "a"):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        write_bytes(tmp_path / "file" / "inside", b"")


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    assert canonical_json({"b": 1, "a": [1.5]}) == canonical_json({"a": [1.5], "b": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []
