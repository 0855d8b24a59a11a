"""A repository of its own for DVC: this project's code and pipelines on tiny models, with one commit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from rwkvq.checkpoint.spec import Version
from tests.small import write_inputs

PROJECT = Path(__file__).parents[1]
RUN = Path("data/runs/demo")
FAMILY = Path("data/runs/family-demo")
_FILES = ("rwkvq", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore")


def write_repository(folder: Path) -> None:
    """Code, pipelines, tiny inputs and a commit of all of it in `folder`, which must be the working directory."""
    for name in _FILES:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(source, folder / name)
    # every section that dvc.yaml names has to be in the file
    values = {"seed": 0, "proxies": {"order": 4}, "plan": {"policy": "rwkvquant"}, "quantize": {"bits": 3}}
    values |= write_inputs(Path("inputs")) | {"run_dir": str(RUN)}
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    write_family(values)
    git("init", "-q", "-b", "main")
    commit("inputs")


def write_family(values: dict[str, Any]) -> None:
    """families/demo.yaml with the names of the project's, on tiny models of both versions."""
    family = yaml.safe_load((PROJECT / "families" / "demo.yaml").read_text())
    versions: dict[str, Version] = {"rwkv7": "x070", "rwkv6": "x060"}
    for name in family["models"]:
        made = write_inputs(Path("inputs") / name, versions[name.split("-")[0]])
        family["models"][name] = {"model": made["model"]}
    shared = {key: values[key] for key in ("windows", "activations", "evaluate", "run")}
    shared["evaluate"] = values["evaluate"] | {"baselines": []}
    Path("families").mkdir()
    Path("families/demo.yaml").write_text(yaml.safe_dump(family | {"settings": shared}, sort_keys=False))


def dvc(*arguments: str) -> str:
    """Run dvc; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    """Environment with this `python` first, for the stages' commands, and without the project on its path."""
    values = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for kind in ("AUTHOR", "COMMITTER"):
        values |= {f"GIT_{kind}_NAME": "test", f"GIT_{kind}_EMAIL": "test@example.org"}
    values.pop("PYTHONPATH", None)
    return values


def git(*arguments: str) -> str:
    """Run git as somebody; return what it printed."""
    return subprocess.run(["git", *arguments], env=environment(), check=True, capture_output=True, text=True).stdout


def commit(message: str) -> None:
    """Commit everything that is not ignored."""
    git("add", "-A")
    git("commit", "-q", "-m", message)


def ran(output: str) -> list[str]:
    """Names of the stages that `dvc repro` ran."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def use(**changes: Any) -> dict[str, Any]:
    """Change params.yaml; return its values."""
    values: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text()) | changes
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return values
