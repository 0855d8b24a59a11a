"""`dvc.yaml` runs the stages of the library: the same code decides, the same work is skipped, figures compare."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rwkvq.run import Run
from rwkvq.settings import parse
from rwkvq.stages import STAGES, run_line
from tests.small import tree_hash, write_inputs

pytest.importorskip("dvc")

REPOSITORY = Path(__file__).parents[2]
RUN = Path("data/runs/demo")
Dvc = Callable[..., str]


@pytest.fixture(scope="module")
def pipeline() -> dict[str, Any]:
    stages: dict[str, Any] = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    return stages


def test_the_stages_are_those_of_the_library(pipeline: dict[str, Any]) -> None:
    assert {name: stage["cmd"] for name, stage in pipeline.items()} == {
        name: f"python -m rwkvq.cli stage {name}" for name in STAGES
    }


@pytest.mark.parametrize("name", STAGES)
def test_the_code_of_a_stage_is_what_its_manifest_hashes(pipeline: dict[str, Any], name: str) -> None:
    paths = {module.replace(".", "/") for module in STAGES[name].code}
    expected = {path if (REPOSITORY / path).is_dir() else f"{path}.py" for path in paths}
    listed = {dep for dep in pipeline[name]["deps"] if dep.startswith("rwkvq/")}
    covered = {path for path in expected if any(Path(folder) in Path(path).parents for folder in expected)}
    assert expected - covered <= listed <= expected


@pytest.mark.parametrize("name", STAGES)
def test_the_settings_of_a_stage_are_what_its_manifest_compares(pipeline: dict[str, Any], name: str) -> None:
    run = Run(parse(yaml.safe_load((REPOSITORY / "params.yaml").read_text()), "params.yaml"))
    run = Run(run.settings.model_copy(update={"model": str(REPOSITORY / run.settings.model)}))
    compared = {key for key in STAGES[name].settings(run) if hasattr(run.settings, key)}
    assert set(pipeline[name].get("params", [])) == compared


@pytest.fixture
def dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dvc:
    """The command in a repository of its own: this project's code and pipeline on a tiny model."""
    monkeypatch.chdir(tmp_path)
    write_repository(tmp_path)
    # `python` and `rwkvq` of the stages' commands
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def write_repository(folder: Path) -> None:
    """Code, pipeline, tiny inputs and one commit."""
    for name in ("rwkvq", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(source, folder / name)
    # every section that dvc.yaml names has to be in the file
    values = {"seed": 0, "proxies": {"order": 4}, "plan": {"policy": "rwkvquant"}, "quantize": {"bits": 3}}
    values |= write_inputs(Path("inputs")) | {"run_dir": str(RUN)}
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    git("init", "-q", "-b", "main")
    commit("inputs")


def git(*arguments: str) -> str:
    """Run git as somebody."""
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout


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


def test_work_of_the_flow_is_adopted_and_figures_compare(dvc: Dvc) -> None:
    run_line(Run(parse(use(), "params.yaml")))
    dvc("commit", "-f")
    assert "up to date" in dvc("status")
    assert ran(dvc("repro")) == []
    commit("run")
    assert git("status", "--short") == ""

    run_line(Run(parse(use(quantize={"bits": 4}), "params.yaml")))
    changes = json.loads(dvc("params", "diff", "--json"))["params.yaml"]
    assert changes == {"quantize.bits": {"old": 3, "new": 4, "diff": 1}}
    figures = json.loads(dvc("metrics", "diff", "--json"))[f"{RUN}/metrics.json"]
    assert figures["quality.rwkvquant.matrix_bits"]["diff"] > 0.5
    assert json.loads(dvc("plots", "show", "--json"))["data"][f"{RUN}/errors.csv"]
    assert json.loads(dvc("plots", "diff", "--json"))["data"][f"{RUN}/errors.csv"]


@pytest.mark.slow
def test_repro_runs_every_stage_once(dvc: Dvc) -> None:
    assert ran(dvc("repro")) == list(STAGES)
    before = tree_hash(RUN)
    assert ran(dvc("repro")) == []
    assert run_line(Run(parse(use(), "params.yaml")))[0].reason == "up to date"
    assert tree_hash(RUN) == before

    shutil.copy("inputs/model.pth", "inputs/other.pth")
    use(model="inputs/other.pth")
    assert "activations" in ran(dvc("repro"))

    Path("dvc.lock").unlink()  # after a flow, or in a clone that has none: each stage returns at once
    assert ran(dvc("repro")) == list(STAGES)
    commit("run")
    assert git("status", "--short") == ""


@pytest.mark.slow
@pytest.mark.parametrize("where", [(), ("--temp",)])
def test_experiments(dvc: Dvc, where: tuple[str, ...]) -> None:
    run_line(Run(parse(use(), "params.yaml")))
    dvc("commit", "-f")
    commit("run")
    dvc("exp", "run", *where, "-n", "four", "-S", "quantize.bits=4")
    shown = json.loads(dvc("exp", "show", "--json"))
    four = shown[1]["experiments"][0]["revs"][0]
    assert four["name"] == "four"
    assert four["data"]["params"]["params.yaml"]["data"]["quantize"]["bits"] == 4
    figures = [rev["metrics"][f"{RUN}/metrics.json"]["data"]["quality"] for rev in (shown[1]["data"], four["data"])]
    assert figures[0]["rwkvquant"]["kl"] > figures[1]["rwkvquant"]["kl"]
    if where:
        assert git("status", "--short") == ""
