"""`dvc.yaml` runs the stages of the library: the same code decides, the same work is skipped, figures compare."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rwkvq.run import Run
from rwkvq.settings import parse
from rwkvq.stages import STAGES, run_line
from tests.repository import PROJECT, RUN, commit, dvc, git, ran, use, write_repository
from tests.small import LINE, tree_hash

pytest.importorskip("dvc")


@pytest.fixture(scope="module")
def pipeline() -> dict[str, Any]:
    """The stages of the single model."""
    stages: dict[str, Any] = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    return {name: stage for name, stage in stages.items() if "do" not in stage and "rwkvq.cli family" not in str(stage)}


def test_the_stages_are_those_of_the_library(pipeline: dict[str, Any]) -> None:
    commands = {name: f"python -m rwkvq.cli stage {name}" for name in LINE}
    # activations, gradients and curves are no outputs, so they may be missing where all that they follow from is there
    first = [f"python -m rwkvq.cli stage {name} --if-needed" for name in ("activations", "gradients", "curves")]
    assert {name: stage["cmd"] for name, stage in pipeline.items()} == commands | {
        "plan": [*first, commands["plan"]],
        "quantize": [*first[:2], commands["quantize"]],
        "pack": ["python -m rwkvq.cli stage distill --if-needed", commands["pack"]],
    }


INSIDE = {"plan": ("gradients", "curves"), "quantize": ("gradients",), "pack": ("distill",)}
"""Stages that only some settings need, made within others."""


@pytest.mark.parametrize("name", LINE)
def test_the_code_of_a_stage_is_what_its_manifest_hashes(pipeline: dict[str, Any], name: str) -> None:
    stages = [STAGES[own] for own in (name, *INSIDE.get(name, ()))]
    paths = {module.replace(".", "/") for stage in stages for module in stage.code}
    expected = {path if (PROJECT / path).is_dir() else f"{path}.py" for path in paths}
    listed = {dep for dep in pipeline[name]["deps"] if dep.startswith("rwkvq/")}
    covered = {path for path in expected if any(Path(folder) in Path(path).parents for folder in expected)}
    if name in INSIDE:  # folders are listed for the many files that the stages inside need
        assert all(listed & {path, *map(str, Path(path).parents)} for path in expected)
    else:
        assert expected - covered <= listed <= expected


@pytest.mark.parametrize("name", LINE)
def test_the_settings_of_a_stage_are_what_its_manifest_compares(pipeline: dict[str, Any], name: str) -> None:
    run = Run(parse(yaml.safe_load((PROJECT / "params.yaml").read_text()), "params.yaml"))
    run = Run(run.settings.model_copy(update={"model": str(PROJECT / run.settings.model)}))
    stages = [STAGES[own] for own in (name, *INSIDE.get(name, ()))]
    compared = {key for stage in stages for key in stage.settings(run) if hasattr(run.settings, key)}
    assert set(pipeline[name].get("params", [])) == compared


@pytest.mark.parametrize("name", LINE)
def test_the_outputs_of_a_stage_are_those_that_differ_from_run_to_run_left_out(
    pipeline: dict[str, Any], name: str
) -> None:
    run = Run(parse(yaml.safe_load((PROJECT / "params.yaml").read_text()), "params.yaml"))
    listed = [path for kind in ("outs", "metrics", "plots") for out in pipeline[name].get(kind, []) for path in out]
    untracked = {"activations", "report.html", "report.md", "summary.json"}
    written = {path.name for path in STAGES[name].outputs(run)} - untracked
    written |= set() if name == "report" else {f"manifests/{name}.json"}  # the page's hash is in the report's
    assert {path.removeprefix("${run_dir}/") for path in listed} == written


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a tiny model, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    write_repository(tmp_path)
    return tmp_path


def finish_and_commit() -> None:
    """The line without DVC, adopted by it, in a commit."""
    run_line(Run(parse(use(), "params.yaml")))
    dvc("commit", "-f", "-d", "report")
    commit("run")


def test_work_of_the_flow_is_adopted_and_figures_compare(repository: Path) -> None:
    finish_and_commit()
    assert "up to date" in dvc("status", "-d", "report")
    assert ran(dvc("repro", "report")) == []
    assert git("status", "--short") == ""

    run_line(Run(parse(use(quantize={"bits": 4}), "params.yaml")))
    changes = json.loads(dvc("params", "diff", "--json", "--targets", "params.yaml"))["params.yaml"]
    assert changes == {"quantize.bits": {"old": 3, "new": 4, "diff": 1}}
    figures = json.loads(dvc("metrics", "diff", "--json"))[f"{RUN}/metrics.json"]
    assert figures["quality.rwkvquant.matrix_bits"]["diff"] > 0.5
    for name in ("errors.csv", "quality.csv"):
        assert json.loads(dvc("plots", "show", "--json"))["data"][f"{RUN}/{name}"]
        assert json.loads(dvc("plots", "diff", "--json"))["data"][f"{RUN}/{name}"]


@pytest.mark.slow
def test_repro_runs_every_stage_once(repository: Path) -> None:
    assert ran(dvc("repro", "report")) == list(LINE)
    before = tree_hash(RUN)
    assert ran(dvc("repro", "report")) == []
    assert run_line(Run(parse(use(), "params.yaml")))[0].reason == "up to date"
    assert tree_hash(RUN) == before

    shutil.copy("inputs/model.pth", "inputs/other.pth")
    use(model="inputs/other.pth")
    assert "activations" in ran(dvc("repro", "report"))

    Path("dvc.lock").unlink()  # after a flow, or in a clone that has none: each stage returns at once
    assert ran(dvc("repro", "report")) == list(LINE)
    commit("run")
    assert git("status", "--short") == ""


def experiments() -> dict[str, dict[str, Any]]:
    """Params and metrics of the experiments on this commit, by name."""
    (shown,) = [row for row in json.loads(dvc("exp", "show", "--json")) if row["rev"] != "workspace"]
    return {item["revs"][0]["name"]: item["revs"][0]["data"] for item in shown["experiments"]}


def points(shown: str, revision: str) -> dict[str, dict[str, float]]:
    """Rows of quality.csv in the answer of `dvc plots ... --json`, by model."""
    (plot,) = json.loads(shown)["data"][f"{RUN}/quality.csv"]
    rows = [row for row in plot["content"]["data"]["values"] if row["rev"] == revision]
    return {row["model"]: {key: float(row[key]) for key in ("file_bits", "kl")} for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("where", [(), ("--temp",)])
def test_experiments(repository: Path, where: tuple[str, ...]) -> None:
    finish_and_commit()
    before = json.loads((RUN / "metrics.json").read_text())["quality"]["rwkvquant"]["kl"]
    dvc("exp", "run", *where, "-n", "four", "-S", "quantize.bits=4", "report")
    four = experiments()["four"]
    assert four["params"]["params.yaml"]["data"]["quantize"]["bits"] == 4
    assert before > four["metrics"][f"{RUN}/metrics.json"]["data"]["quality"]["rwkvquant"]["kl"]
    if where:
        assert git("status", "--short") == ""


@pytest.mark.slow
def test_policies_are_queued_and_compared(repository: Path) -> None:
    # dvc.lock knows nothing of the family here, and `dvc exp apply` checks out every output there is
    pipelines = yaml.safe_load(Path("dvc.yaml").read_text())
    pipelines["stages"] = {name: stage for name, stage in pipelines["stages"].items() if name in LINE}
    Path("dvc.yaml").write_text(yaml.safe_dump(pipelines, sort_keys=False))
    finish_and_commit()
    policies = ("rtn", "sq", "rwkvquant")
    dvc("exp", "run", "--queue", "-S", f"plan.policy={','.join(policies)}", "report")
    dvc("exp", "run", "--run-all")
    named = {data["params"]["params.yaml"]["data"]["plan"]["policy"]: name for name, data in experiments().items()}
    assert set(named) == set(policies)
    shown = dvc("plots", "diff", "--json", *named.values())
    kl = {policy: points(shown, name)[policy]["kl"] for policy, name in named.items()}
    assert kl["rtn"] > kl["sq"] > kl["rwkvquant"]
    assert points(dvc("plots", "show", "--json"), "workspace")["rwkvquant"]["kl"] == kl["rwkvquant"]
    assert git("status", "--short") == ""
    dvc("exp", "apply", named["sq"])
    assert json.loads((RUN / "plan.json").read_text())["policy"] == "sq"


@pytest.mark.slow
def test_a_fresh_clone_pulls_and_has_nothing_to_do(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("elsewhere")
    finish_and_commit()
    dvc("remote", "add", "-d", "storage", str(folder / "remote"))
    dvc("push")
    commit("remote")
    before = tree_hash(RUN / "artifact")
    git("clone", "-q", str(repository), str(folder / "clone"))
    monkeypatch.chdir(folder / "clone")

    dvc("pull", "report", "-d")
    assert "up to date" in dvc("status", "-d", "report")
    assert "in sync" in dvc("status", "-c", "-d", "report")
    assert ran(dvc("repro", "report")) == []
    assert tree_hash(RUN / "artifact") == before
    assert not (RUN / "activations").exists()
    assert git("status", "--short") == ""

    use(quantize={"bits": 4})  # needs the cache of activations, which is built here
    assert ran(dvc("repro", "report")) == ["plan", "quantize", "pack", "evaluate", "report"]
    assert (RUN / "activations").is_dir()
    assert "up to date" in dvc("status", "-d", "report")
