"""A study in miniature: one tiny model, its texts, and the file that describes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from rwkvq.ablations.study import Study, load_study, write_texts
from rwkvq.checkpoint.spec import Version
from rwkvq.run import Run
from rwkvq.stages import run_line
from tests.small import write_inputs


def write_study(folder: Path, version: Version = "x070") -> Path:
    """Write a model, its texts and `study.yaml` into `folder`; return that file."""
    values = write_inputs(folder / "in", version)
    settings = {name: values[name] for name in ("windows", "activations", "evaluate", "run")}
    content = {
        "out": str(folder / "out"),
        "settings": settings,
        "models": {"tiny": {"model": values["model"]}},
        "seeds": [0, 1],
        "leak_windows": 2,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run_lines(study: Study, lines: Sequence[str]) -> None:
    """Run some lines of the first seed in this process."""
    write_texts(study)
    for line in lines:
        run_line(Run(study.settings_of("tiny", study.seeds[0], line)))


def tiny_study(folder: Path, *experiments: str, version: Version = "x070") -> Study:
    """A study of chosen experiments and one seed."""
    return load_study(write_study(folder, version), experiments=experiments, seeds=[0])
