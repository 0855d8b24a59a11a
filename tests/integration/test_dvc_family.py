"""`dvc repro family` runs the cells of families/demo.yaml: the same folders, the same skipping as the family flow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rwkvq.family.family import Cell, Family, load_family
from rwkvq.family.results import read_results, reasons_to_run, write_results
from rwkvq.run import SHARED
from rwkvq.stages import STAGES, run_line
from tests.repository import FAMILY, PROJECT, commit, dvc, git, ran, write_repository
from tests.small import LINE, tree_hash

pytest.importorskip("dvc")

FILE = Path("families/demo.yaml")
NO_OUTPUTS = {"activations", "report.html", "report.md", "summary.json"}
"""What is made again or differs from run to run."""


@pytest.fixture(scope="module")
def stages() -> dict[str, dict[str, set[str]]]:
    """Paths of deps and outs of every stage of the project's dvc.yaml as DVC expands it, and its commands, by name."""
    from dvc.repo import Repo

    with Repo(str(PROJECT)) as repo:
        return {
            stage.addressing: {
                "deps": {dep.def_path for dep in stage.deps if not hasattr(dep, "params")},
                "outs": {out.def_path for out in stage.outs},
                "cmd": {stage.cmd} if isinstance(stage.cmd, str) else set(stage.cmd),
                "params": {name for dep in stage.deps for name in getattr(dep, "params", [])},
            }
            for stage in repo.index.stages
            if stage.path_in_repo == "dvc.yaml"
        }


@pytest.fixture(scope="module")
def family() -> Family:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        return load_family(FILE)


def dvc_name(cell: Cell) -> str:
    return f"cell@{cell.model}-{cell.policy}"


def names_in(family: Family) -> list[str]:
    return [*(f"shared@{name}" for name in family.file.models), *map(dvc_name, family.cells), "family"]


def covered(code: tuple[str, ...], deps: set[str]) -> bool:
    """True if every module of `code` lies in a listed file or folder."""
    paths = [Path(f"{module.replace('.', '/')}") for module in code]
    return all({str(path), f"{path}.py", *map(str, path.parents)} & deps for path in paths)


def outputs(cell: Cell, names: list[str]) -> set[str]:
    """What DVC keeps of the stages `names`: outputs and manifests, without what differs from run to run."""
    run = cell.run
    written = {path for name in names for path in STAGES[name].outputs(run) if path.name not in NO_OUTPUTS}
    manifests = {run.folder_of(name) / "manifests" / f"{name}.json" for name in names if name != "report"}
    return {str(path) for path in written | manifests}


def test_the_stages_are_the_cells_of_the_family(stages: dict[str, Any], family: Family) -> None:
    assert [name for name in stages if name not in LINE] == names_in(family)


def test_shared_work(stages: dict[str, Any], family: Family) -> None:
    for cell in family.cells:
        stage, run = stages[f"shared@{cell.model}"], cell.run
        inputs = {str(run.model_path), run.settings.windows.source, str(run.tokenizer_path)}
        assert {dep for dep in stage["deps"] if not dep.startswith("rwkvq/")} == inputs
        assert covered(sum((STAGES[name].code for name in SHARED if name in LINE), ()), stage["deps"])
        assert stage["outs"] == outputs(cell, [name for name in SHARED if name in LINE])
        assert stage["cmd"] == {f"python -m rwkvq.cli family shared {FILE} {cell.model}"}
        assert stage["params"] == {"out", "settings", f"models.{cell.model}"}


def test_cells(stages: dict[str, Any], family: Family) -> None:
    own = [name for name in LINE if name not in SHARED]
    for cell in family.cells:
        stage, settings = stages[dvc_name(cell)], cell.settings
        inputs = {
            settings.windows.source,
            settings.windows.tokenizer,
            settings.evaluate.text,
            settings.evaluate.lambada,
        }
        shared = stages[f"shared@{cell.model}"]["outs"]
        assert {dep for dep in stage["deps"] if not dep.startswith("rwkvq/")} - shared == inputs
        assert len(stage["deps"] & shared) == 4  # the manifest of the windows says no more than the windows
        assert covered(sum((STAGES[name].code for name in own), ()), stage["deps"])
        assert stage["outs"] == outputs(cell, own)
        assert f"python -m rwkvq.cli family cell {FILE} {cell.model} {cell.policy}" in stage["cmd"]
        assert stage["params"] == {"out", "settings", f"models.{cell.model}", f"policies.{cell.policy}"}


def test_the_table_waits_for_every_cell(stages: dict[str, Any], family: Family) -> None:
    stage = stages["family"]
    cells = {str(cell.run.folder / "manifests" / "evaluate.json") for cell in family.cells}
    assert {dep for dep in stage["deps"] if not dep.startswith("rwkvq/")} == cells
    assert stage["outs"] == {str(family.table), str(family.metrics)}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with tiny models under the names of the project's family, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    write_repository(tmp_path)
    return tmp_path


def change_policy(name: str, values: dict[str, Any]) -> None:
    """Give a policy of the family file other settings."""
    family = yaml.safe_load(FILE.read_text())
    family["policies"][name] = values
    FILE.write_text(yaml.safe_dump(family, sort_keys=False))


def points(shown: str) -> set[tuple[str, str]]:
    """(model, policy) of the rows that `dvc plots ... --json` would draw."""
    (plot,) = json.loads(shown)["data"][f"{FAMILY}/family.csv"]
    rows = plot["content"]["data"]["values"]
    assert all(float(row["file_bits"]) > 0 and float(row["kl"]) > 0 for row in rows)
    return {(row["model"], row["policy"]) for row in rows}


@pytest.mark.slow
def test_work_of_the_flow_is_adopted(repository: Path) -> None:
    family = load_family(FILE)
    for cell in family.cells:
        run_line(cell.run)
    write_results(family, read_results(family))
    dvc("commit", "-f", "-d", "family")
    assert "up to date" in dvc("status", "-d", "family")
    assert ran(dvc("repro", "family")) == []
    commit("family")
    assert git("status", "--short") == ""

    assert points(dvc("plots", "show", "--json")) == {(cell.model, cell.policy) for cell in family.cells}
    change_policy("sq", {"plan": {"policy": "sq"}, "quantize": {"bits": 4}})
    changed = [dvc_name(cell) for cell in family.cells if cell.policy == "sq"]
    assert ran(dvc("repro", "family")) == [*changed, "family"]
    figures = json.loads(dvc("metrics", "diff", "--json"))[f"{FAMILY}/metrics.json"]
    assert {name.rsplit(".", 1)[0] for name in figures} == {f"{model}.sq" for model in family.file.models}
    assert len(json.loads(dvc("plots", "diff", "--json"))["data"][f"{FAMILY}/family.csv"]) == 1
    assert reasons_to_run(load_family(FILE)) == {}


@pytest.mark.slow
def test_repro_leaves_nothing_to_the_flow_and_a_clone_nothing_to_do(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("elsewhere")
    family = load_family(FILE)
    assert sorted(ran(dvc("repro", "family"))) == sorted(names_in(family))
    assert reasons_to_run(family) == {}
    dvc("remote", "add", "-d", "storage", str(folder / "remote"))
    dvc("push", "-d", "family")
    commit("family")
    before = {cell.name: tree_hash(cell.run.artifact) for cell in family.cells}

    git("clone", "-q", str(repository), str(folder / "clone"))
    monkeypatch.chdir(folder / "clone")
    dvc("pull", "-d", "family")
    assert "up to date" in dvc("status", "-d", "family")
    assert ran(dvc("repro", "family")) == []
    assert {cell.name: tree_hash(cell.run.artifact) for cell in load_family(FILE).cells} == before
    assert ran(dvc("repro", "-f", "-s", "family")) == ["family"]  # the table comes out the same without the caches
    assert git("status", "--short") == ""
