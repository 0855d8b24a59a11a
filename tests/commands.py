"""The real `rwkvq` command in this process, and what a refusal must look like."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rwkvq import stages
from rwkvq.cli import INTERRUPTIONS, app, run_app
from rwkvq.run import Run
from tests.small import settings_of


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Run `rwkvq ARGUMENTS` and return its outcome; this process keeps its own signal handlers."""
    handlers = {number: signal.getsignal(number) for number in INTERRUPTIONS}
    capsys.readouterr()
    try:
        code = run_app(app, [str(item) for item in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    shown = capsys.readouterr()
    return Outcome(code, shown.out, shown.err)


def refused(outcome: Outcome, *words: object) -> str:
    """Assert exit code 1 and exactly one error line that holds all `words`; return the line."""
    assert outcome.code == 1, outcome
    return one_error_line(outcome.err, *words)


def one_error_line(err: str, *words: object) -> str:
    """Assert that stderr holds one line `error: ...` with all `words`, nothing after it and no traceback."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert lines[-1] == errors[0], err
    for word in words:
        assert str(word) in errors[0], f"{word!r} not in {errors[0]!r}"
    return errors[0]


def unfinished(folder: Path) -> list[str]:
    """Temporary files and folders below `folder`: what a failed command must not leave."""
    return [str(path) for path in folder.rglob(".*") if path.suffix in (".tmp", ".old")]


def write_params(path: Path, values: dict[str, Any]) -> Path:
    """Write settings values as YAML; returns `path`."""
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def quantize_arguments(inputs: Path, out: Path, *more: object) -> list[object]:
    """`rwkvq quantize` on the files of tests.small.write_inputs in `inputs`; later options win."""
    return [
        "quantize",
        inputs / "model.pth",
        "--out",
        out,
        "--calibration",
        inputs / "calibration.txt",
        "--tokenizer",
        inputs / "vocabulary.txt",
        "--workers",
        "1",
        "--policy",
        "rwkvquant",
        *(item for name, value in SMALL.items() for item in ("--set", f"windows.{name}={value}")),
        *more,
    ]


SMALL = {"samples": 12, "length": 48, "held_out": 2}
"""Sizes of the calibration windows, as in tests.small."""


def copied_run(undisturbed: tuple[Path, dict[str, Any]], folder: Path, names: Sequence[str]) -> Path:
    """A settings file whose run folder holds the undisturbed results of the stages `names`."""
    run, target = Run(settings_of(undisturbed[1])), folder / "run"
    (target / "manifests").mkdir(parents=True)
    for name in names:
        shutil.copy(run.folder / "manifests" / f"{name}.json", target / "manifests")
        for path in stages.STAGES[name].outputs(run):
            there = target / path.relative_to(run.folder)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, there)
    return write_params(folder / "params.yaml", undisturbed[1] | {"run_dir": str(target)})


def nothing_written(folder: Path, out: Path) -> None:
    assert not out.exists()
    assert unfinished(folder) == []


def refuse_quantize(
    capsys: pytest.CaptureFixture[str], inputs: Path, *words: object, more: tuple[object, ...] = ()
) -> str:
    """`quantize` must refuse, and leave neither OUT nor anything half-written."""
    out = inputs.parent / "OUT"
    line = refused(command(capsys, *quantize_arguments(inputs, out, *more)), *words)
    nothing_written(inputs.parent, out)
    return line
