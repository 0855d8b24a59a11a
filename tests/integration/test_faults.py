"""Ctrl-C, kill -9 and lost workers, with real processes: the same command again finishes, and the bytes are equal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rwkvq import stages
from rwkvq.run import Run
from tests.commands import copied_run, quantize_arguments, unfinished
from tests.small import LINE, settings_of, tree_hash

ROOT = Path(__file__).resolve().parents[2]
TAG = "RWKVQ_TEST_RUN"
"""Environment variable that marks the processes of one test, so that those of other runs are left alone."""

PAUSE = """
import os, sys, time
from pathlib import Path
mark, number, sync = Path(sys.argv[1]), int(sys.argv[2]), os.fsync
def pause(file):
    # the new file is complete under its temporary name, and the old one is still in place
    global number
    number -= 1
    if number == 0:
        mark.touch()
        time.sleep(600)
    sync(file)
os.fsync = pause
from rwkvq.cli import main
main(sys.argv[3:])
"""
"""The command line, stopped while it writes its n-th file: a place to kill it that does not depend on the clock."""

DAMAGE = {"ctrl-c": signal.SIGINT, "kill": signal.SIGKILL}


@dataclass
class Command:
    """A running `rwkvq` command in a process group of its own."""

    process: subprocess.Popen[str]
    tag: str

    def family(self) -> list[psutil.Process]:
        """All living processes that the command started, itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TAG) == self.tag:
                    found.append(process)
            except psutil.Error:
                continue  # it ended, or is not ours
        return found

    def strike(self, damage: signal.Signals) -> str:
        """Ctrl-C goes to the whole group, as from a terminal; kill -9 to the command alone. Returns its stderr."""
        if damage == signal.SIGINT:
            os.killpg(self.process.pid, damage)
        else:
            self.process.kill()
        shown = self.process.communicate(timeout=60)[1]
        deadline = time.monotonic() + 60
        while self.family() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.family() == [], "a process was left behind"
        return shown

    def wait_for(self, folder: Path, pattern: str) -> Path:
        """Wait until a file that matches is below `folder`."""
        while not (found := sorted(folder.glob(pattern))):
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.005)
        return found[0]


@dataclass
class Starter:
    """Starts commands for one test."""

    folder: Path
    started: list[Command]

    def __call__(self, *arguments: object) -> Command:
        """`python -m rwkvq.cli ARGUMENTS`"""
        return self._start("-m", "rwkvq.cli", *arguments)

    def paused(self, number: int, *arguments: object) -> Command:
        """The same command, stopped while it writes its n-th file."""
        mark = self.folder / f"mark-{uuid.uuid4().hex}"
        command = self._start("-c", PAUSE, mark, number, *arguments)
        command.wait_for(self.folder, mark.name)
        return command

    def finish(self, *arguments: object) -> str:
        """Run a command to its end; return stderr."""
        command = self(*arguments)
        shown = command.process.communicate(timeout=300)[1]
        assert command.process.returncode == 0, shown
        return shown

    def _start(self, *arguments: object) -> Command:
        tag = uuid.uuid4().hex
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {TAG: tag, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(Command(process, tag))
        return self.started[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path, [])
    yield starter
    for command in starter.started:
        for process in command.family():
            process.kill()


def run_in(undisturbed: tuple[Path, dict[str, Any]], folder: Path) -> Run:
    """The run of `copied_run`."""
    return Run(settings_of(undisturbed[1] | {"run_dir": str(folder / "run")}))


def assert_same_outputs(run: Run, undisturbed: tuple[Path, dict[str, Any]], names: list[str]) -> None:
    source = Run(settings_of(undisturbed[1]))
    for name in names:
        for mine, expected in zip(stages.STAGES[name].outputs(run), stages.STAGES[name].outputs(source), strict=True):
            if expected.is_dir():
                assert tree_hash(mine) == tree_hash(expected), name
            elif expected.stem != "report":  # it shows seconds
                assert mine.read_bytes() == expected.read_bytes(), mine.name


def assert_interrupted(command: Command, shown: str) -> None:
    lines = [line for line in shown.splitlines() if line.strip()]
    assert command.process.returncode == 130, shown
    assert "Traceback" not in shown
    assert "Exception" not in shown
    assert [line for line in lines if line.startswith(("error", "interrupted"))] == lines[-1:], shown


def break_and_resume(
    start: Starter, undisturbed: tuple[Path, dict[str, Any]], name: str, number: int, damage: signal.Signals
) -> None:
    """Stop stage `name` while it writes its n-th file, then run it again."""
    names = list(LINE)
    params, run = copied_run(undisturbed, start.folder, names[: names.index(name)]), run_in(undisturbed, start.folder)
    command = start.paused(number, "stage", name, "--params", params)
    shown = command.strike(damage)
    if damage == signal.SIGINT:
        assert_interrupted(command, shown)
        assert unfinished(run.folder) == []
    else:
        assert command.process.returncode == -signal.SIGKILL
        assert unfinished(run.folder)
    assert not (run.folder / "manifests" / f"{name}.json").exists()
    start.finish("stage", name, "--params", params)
    assert unfinished(run.folder) == []
    assert_same_outputs(run, undisturbed, names[: names.index(name) + 1])


def test_kill_in_the_middle_of_a_file(start: Starter, undisturbed: tuple[Path, dict[str, Any]]) -> None:
    break_and_resume(start, undisturbed, "activations", 2, signal.SIGKILL)


def test_ctrl_c_while_workers_quantize(
    start: Starter, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, work = tmp_path / "OUT", tmp_path / "OUT.work"
    arguments = quantize_arguments(undisturbed[0], out)
    command = start(*arguments)
    command.wait_for(work, "quantized/*/*.safetensors")
    assert len(command.family()) == 2
    shown = command.strike(signal.SIGINT)
    assert_interrupted(command, shown)
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in work.glob("quantized/*/*.safetensors")}
    assert kept
    start.finish(*arguments, "--keep-work")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in ("model.safetensors", "quantization.json", "config.json"):
        assert (out / name).read_bytes() == (undisturbed[0] / "run" / "artifact" / name).read_bytes()
    assert unfinished(tmp_path) == []


def test_a_killed_worker_is_replaced(start: Starter, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    names = list(LINE)
    params, run = copied_run(undisturbed, tmp_path, names[: names.index("quantize")]), run_in(undisturbed, tmp_path)
    command = start("stage", "quantize", "--params", params)
    command.wait_for(run.quantized, "*/*.safetensors")
    workers = [process for process in command.family() if process.pid != command.process.pid]
    assert len(workers) == 1
    workers[0].kill()
    shown = command.process.communicate(timeout=120)[1]
    assert command.process.returncode == 0, shown
    assert "killed by signal 9" in shown and "trying again" in shown
    assert_same_outputs(run, undisturbed, ["quantize"])
    assert command.family() == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", [name for name in LINE if name != "quantize"])
def test_every_stage_survives(
    start: Starter, undisturbed: tuple[Path, dict[str, Any]], name: str, number: int, damage: str
) -> None:
    # the second file of a stage that writes one is its manifest: all is there, but nothing says so
    break_and_resume(start, undisturbed, name, number, DAMAGE[damage])


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("files", [1, 5, 15, 25])
def test_quantize_survives_with_any_number_of_tensors_done(
    start: Starter, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, files: int, damage: str
) -> None:
    names = list(LINE)
    params, run = copied_run(undisturbed, tmp_path, names[: names.index("quantize")]), run_in(undisturbed, tmp_path)
    command = start("stage", "quantize", "--params", params)
    while len(list(run.quantized.glob("*/*.safetensors"))) < files:
        assert command.process.poll() is None
        time.sleep(0.002)
    shown = command.strike(DAMAGE[damage])
    if DAMAGE[damage] == signal.SIGINT:
        assert_interrupted(command, shown)
    assert not (run.folder / "manifests" / "quantize.json").exists()
    start.finish("stage", "quantize", "--params", params)
    assert unfinished(run.folder) == []
    assert_same_outputs(run, undisturbed, ["quantize"])


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_whole_command_survives_a_chain_of_interruptions(
    start: Starter, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, damage: str
) -> None:
    """Stopped at its first file, then, resumed, at its second, and so on: each run gets a little further."""
    out = tmp_path / "OUT"
    arguments = quantize_arguments(undisturbed[0], out)
    for number in (1, 2, 3, 1, 4, 6, 8, 10):
        command = start._start("-c", PAUSE, tmp_path / f"stop-{number}", number, *arguments)
        command.wait_for(tmp_path, f"stop-{number}")
        (tmp_path / f"stop-{number}").unlink()
        shown = command.strike(DAMAGE[damage])
        if DAMAGE[damage] == signal.SIGINT:
            assert_interrupted(command, shown)
        assert not out.exists()
    start.finish(*arguments)
    for name in ("model.safetensors", "quantization.json", "config.json"):
        assert (out / name).read_bytes() == (undisturbed[0] / "run" / "artifact" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OUT"]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0])
def test_ctrl_c_at_any_time(
    start: Starter, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, delay: float
) -> None:
    out = tmp_path / "OUT"
    arguments = quantize_arguments(undisturbed[0], out, "--workers", 2)
    command = start(*arguments)
    command.wait_for(tmp_path, "OUT.work/.lock")
    time.sleep(delay)
    shown = command.strike(signal.SIGINT)
    if command.process.returncode:
        assert_interrupted(command, shown)
        assert not out.exists()
        assert unfinished(tmp_path) == []
        start.finish(*arguments)
    for name in ("model.safetensors", "quantization.json", "config.json"):
        assert (out / name).read_bytes() == (undisturbed[0] / "run" / "artifact" / name).read_bytes()
