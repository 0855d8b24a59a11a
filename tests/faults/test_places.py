"""Inputs that vanish or change and places that refuse, in the middle of the flow."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkvq import stages
from rwkvq.run import Run
from tests.commands import unfinished
from tests.faults.flow import TENSOR, Flow
from tests.small import sentences, settings_of, tree_hash, write_inputs
from tests.tiny import write_tiny

slow = pytest.mark.slow


def own_model(flow: Flow) -> Path:
    """A copy of the model for this run alone: a test may move or replace it."""
    path = flow.folder / "own" / "model.pth"
    path.parent.mkdir()
    shutil.copyfile(flow.undisturbed[1]["model"], path)
    return path


@slow
def test_a_checkpoint_that_vanishes_is_named(flow: Flow) -> None:
    model = own_model(flow)
    flow.prepare("quantize", model=str(model))
    command = flow.paused(TENSOR, "run.workers=1")
    kept = flow.tensors()
    away = model.rename(model.with_name("away.pth"))
    command.resume()
    command.fail(model, "no such file")
    away.rename(model)
    flow.start().finish()
    flow.assert_same(kept)


@slow
def test_a_checkpoint_that_is_replaced_is_noticed(flow: Flow) -> None:
    model = own_model(flow)
    flow.prepare("quantize", model=str(model))
    command = flow.paused(TENSOR, "run.workers=1")
    kept = flow.tensors()
    mine = model.rename(model.with_name("mine.pth"))
    write_tiny(model, "x070", seed=1)
    command.resume()
    command.fail(flow.run.activations, "checkpoint has changed since it was built")
    assert not flow.run.artifact.exists()
    os.replace(mine, model)
    flow.start().finish()
    flow.assert_same(kept)


@slow
def test_other_calibration_text_is_a_reason_to_run_again(flow: Flow) -> None:
    flow.prepare("pack")
    text = flow.folder / "calibration.txt"
    kept = flow.tensors()
    text.write_text(sentences(1500, 9))
    changed = flow.paused("activations/block-001.parquet", f"windows.source={text}")
    assert "s (windows differ: windows.source " in changed.log()
    changed.strike()
    assert "s (windows differ: windows.source " in flow.start().finish()
    flow.assert_same(kept)


def test_a_text_that_changes_while_it_is_read_is_noticed_the_next_time(tmp_path: Path) -> None:
    values = write_inputs(tmp_path)
    text = Path(values["windows"]["source"])
    run = Run(settings_of(values))
    stages.run_stage(run, "windows", lambda what, done, total: text.write_text(sentences(1500, 9)) and None)
    again = stages.run_stage(Run(run.settings), "windows")
    assert again.ran and again.reason.startswith("input text differs")


@slow
def test_the_second_of_two_runs_on_one_folder_is_refused(flow: Flow) -> None:
    flow.prepare("quantize")
    first = flow.paused(TENSOR)
    flow.start().fail(flow.run.folder, "another run is using this folder")
    first.resume()
    first.finish()
    flow.assert_same()


@slow
def test_a_temporary_folder_that_is_not_there_changes_nothing(flow: Flow, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    flow.prepare("quantize")
    nowhere = str(tmp_path / "file" / "tmp")
    flow.start(TMPDIR=nowhere, TMP=nowhere, TEMP=nowhere).finish()
    flow.assert_same()


@slow
def test_few_open_files_are_enough(flow: Flow) -> None:
    flow.prepare("quantize")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # inherited
    try:
        command = flow.start("run.workers=2")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    command.finish()
    flow.assert_same()


def mount(*options: object) -> int:
    """Exit code of the mount command."""
    try:
        return subprocess.run(["mount", *map(str, options)], capture_output=True, check=False).returncode
    except FileNotFoundError:
        return 127


@pytest.fixture
def disk(flow: Flow) -> Iterator[Path]:
    """A tmpfs of 64 MB as the run folder; skipped where mounting is not permitted."""
    folder = flow.folder / "run"
    folder.mkdir()
    if mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", folder):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@slow
def test_a_disk_that_fills_up_is_named_and_space_is_enough_to_go_on(flow: Flow, disk: Path) -> None:
    flow.prepare("quantize")
    command = flow.paused(TENSOR)
    kept = flow.tensors()
    status = os.statvfs(disk)
    used = (status.f_blocks - status.f_bfree) * status.f_bsize
    assert mount("-o", f"remount,size={used + 8192}", disk) == 0
    command.resume()
    command.fail(disk, "the disk is full", "finished work is kept")
    assert unfinished(disk) == []
    assert mount("-o", "remount,size=64m", disk) == 0
    flow.start().finish()
    flow.assert_same(kept)


@slow
def test_a_disk_that_becomes_read_only_is_named(flow: Flow, disk: Path) -> None:
    flow.prepare("pack")
    command = flow.paused("/config.json")
    before = tree_hash(flow.run.quantized)
    # a file that is open for writing keeps the system from remounting
    assert subprocess.run(["mount", "-o", "bind", str(disk), str(disk)], check=False).returncode == 0
    try:
        assert mount("-o", "remount,bind,ro", disk) == 0
        command.resume()
        command.fail(disk, "read-only")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    assert tree_hash(flow.run.quantized) == before
    flow.start().finish()
    flow.assert_same()
