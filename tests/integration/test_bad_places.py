"""Places that cannot be written, and full disks: one line, nothing half-written, the same bytes once there is space."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rwkvq import stages
from rwkvq.files import run_lock
from rwkvq.run import Run
from tests.commands import (
    command,
    copied_run,
    nothing_written,
    quantize_arguments,
    refuse_quantize,
    refused,
    unfinished,
)
from tests.small import LINE, settings_of, tree_hash

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("shared_workers")


def test_an_existing_folder_is_not_touched(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    refused(command(capsys, *quantize_arguments(inputs, out)), out, "already exists", "--overwrite")
    refused(command(capsys, *quantize_arguments(inputs, out, "--overwrite")), out, "is no artifact")
    assert tree_hash(out).keys() == {"diary.txt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OUT", "in"]


def test_a_file_is_not_replaced_by_a_folder(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    out.write_text("mine")
    refused(command(capsys, *quantize_arguments(inputs, out)), out, "already exists")
    refused(command(capsys, *quantize_arguments(inputs, out, "--overwrite")), out, "is no artifact")
    assert out.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused_at_the_start(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "OUT"
    for more in ((), ("--work", tmp_path / "work")):
        refused(command(capsys, *quantize_arguments(inputs, out, *more)), out, "file", "choose another folder")
    refused(command(capsys, *quantize_arguments(inputs, tmp_path / "OUT", "--work", out)), out, "is a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in"]


def test_the_work_folder_must_not_hold_the_result(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "w", tmp_path / "w" / "artifact"):
        refused(command(capsys, *quantize_arguments(inputs, out, "--work", tmp_path / "w")), out, "work folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_run_folder_in_use_is_refused(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with run_lock(work):
        refuse_quantize(capsys, inputs, work, "another run", more=("--work", work))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 MB; skipped where mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", folder):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def mount(*options: object) -> int:
    """Exit code of the mount command."""
    try:
        done = subprocess.run(["mount", *map(str, options)], capture_output=True, check=False)
    except FileNotFoundError:
        return 127
    return done.returncode


def test_a_read_only_disk_is_named_at_the_start(capsys: Capture, inputs: Path, mounted: Path) -> None:
    mount("-o", "remount,ro", mounted)
    for more in ((), ("--work", inputs.parent / "work")):
        refused(command(capsys, *quantize_arguments(inputs, mounted / "OUT", *more)), mounted / "OUT", "choose another")
    refused(command(capsys, "export", inputs / "model.pth", mounted / "a.pth"), mounted / "a.pth", "read-only")
    assert list(mounted.iterdir()) == []
    assert not (inputs.parent / "work").exists()


def test_a_folder_without_permission_is_named(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.geteuid() == 0 and subprocess.run(["chattr", "+i", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("root may write anywhere and chattr is not permitted here")
    try:
        refused(command(capsys, *quantize_arguments(inputs, folder / "OUT")), folder / "OUT", "permission")
        refused(command(capsys, "export", inputs / "model.pth", folder / "a.pth"), folder / "a.pth", "permission")
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["chattr", "-i", str(folder)], capture_output=True, check=False)


def limit(disk: Path, free: int) -> None:
    """Leave `free` bytes on the tmpfs `disk`."""
    status = os.statvfs(disk)
    used = (status.f_blocks - status.f_bfree) * status.f_bsize
    assert mount("-o", f"remount,size={used + free}", disk) == 0


@pytest.mark.parametrize("name", LINE)
def test_a_stage_on_a_full_disk_stops_in_one_line_and_goes_on_when_there_is_space(
    capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], mounted: Path, name: str
) -> None:
    names = list(LINE)
    params = copied_run(undisturbed, mounted, tuple(names[: names.index(name)]))
    run = mounted / "run"
    # nothing fits; then the first part of it
    for free in (0, 8192) if name != "quantize" else (16384,):
        limit(mounted, free)
        line = refused(command(capsys, "stage", name, "--params", params), run, "the disk is full")
        assert "finished work is kept" in line
        assert unfinished(run) == []
        assert not (run / "manifests" / f"{name}.json").exists()
        if name == "windows":  # its one file is smaller than any part
            break
    assert mount("-o", "remount,size=64m", mounted) == 0
    assert command(capsys, "stage", name, "--params", params).code == 0
    for path in stages.STAGES[name].outputs(Run(settings_of(undisturbed[1]))):
        mine = run / path.name
        if path.is_dir():
            assert tree_hash(mine) == tree_hash(path)
        elif path.stem != "report":  # it shows seconds
            assert mine.read_bytes() == path.read_bytes(), path.name


def test_quantize_on_a_full_disk_goes_on_when_there_is_space(
    capsys: Capture, inputs: Path, undisturbed: tuple[Path, dict[str, Any]], mounted: Path
) -> None:
    assert mount("-o", "remount,size=1m", mounted) == 0
    arguments = quantize_arguments(inputs, mounted / "OUT")
    refused(command(capsys, *arguments), mounted, "the disk is full")
    nothing_written(mounted, mounted / "OUT")
    limit(mounted, 330_000)  # the run fits now, its copy in OUT does not
    refused(command(capsys, *arguments), mounted, "the disk is full")
    nothing_written(mounted, mounted / "OUT")
    assert mount("-o", "remount,size=64m", mounted) == 0
    assert command(capsys, *arguments).code == 0
    for name in ("model.safetensors", "quantization.json", "config.json"):
        assert (mounted / "OUT" / name).read_bytes() == (undisturbed[0] / "run" / "artifact" / name).read_bytes()
    assert [path.name for path in mounted.iterdir()] == ["OUT"]
