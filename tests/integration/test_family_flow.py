"""The family flow as a user starts it: one cell fails, the others do not; the next run does only what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rwkvq.family.family import Family, load_family
from rwkvq.family.results import read_summary
from tests.faults.flow import eventually
from tests.small import tree_hash
from tests.small_family import POLICIES, write_family

pytest.importorskip("prefect")

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Home:
    """A folder with a family and a Prefect home."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "family.yaml"

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "DO_NOT_TRACK"))}
        return kept | {"PREFECT_HOME": str(self.folder / "prefect"), "OMP_NUM_THREADS": "1"}

    def family(self) -> Family:
        return load_family(self.file)

    def run(self, *options: str, code: int = 0) -> str:
        """Run the flow to its end; return what it said."""
        done = subprocess.run(
            [sys.executable, "-m", "flows.quantize_family", str(self.file), *options],
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert eventually(lambda: not list(self.processes()))
        return done.stderr

    def processes(self) -> Iterator[psutil.Process]:
        """Everything that runs with this Prefect home."""
        for process in psutil.process_iter():
            try:
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                if is_alive and process.environ().get("PREFECT_HOME") == self.environment["PREFECT_HOME"]:
                    yield process
            except psutil.Error:
                continue

    def change(self, **values: Any) -> None:
        """Change the top level of the family file."""
        self.file.write_text(yaml.safe_dump(yaml.safe_load(self.file.read_text()) | values, sort_keys=False))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A family of a good model under two policies and a model that is not there."""
    folder = tmp_path_factory.mktemp("family")
    write_family(folder, policies={name: POLICIES[name] for name in ("rtn", "sq")})
    (folder / "six" / "model.safetensors").rename(folder / "away")
    return Home(folder)


@pytest.fixture(scope="module")
def first(home: Home) -> str:
    """What the first run says."""
    return home.run(code=1)


def test_a_failed_model_leaves_the_others_running(home: Home, first: str) -> None:
    states = {name: result.state for name, result in read_summary(home.family()).items()}
    assert states == {"seven rtn": "done", "seven sq": "done", "six rtn": "not run", "six sq": "not run"}
    last = first.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(home.file) in last and "2 of 4 cells are not done" in last and "no such file" in last
    assert "run the same command again" in last
    page = home.family().page.read_text()
    assert "model.safetensors: no such file" in page and "seven/sq/report.html" in page


def test_the_next_run_does_only_what_is_missing(home: Home, first: str) -> None:
    done = {path: tree_hash(path) for path in (home.folder / "out" / "seven", home.folder / "out" / "shared" / "seven")}
    shutil.copy(home.folder / "away", home.folder / "six" / "model.safetensors")
    said = home.run()
    assert "2 of 4 cells to do" in said
    assert "seven sq: up to date" in said
    assert not [line for line in said.splitlines() if "seven" in line and "done in" in line]
    assert all(tree_hash(path) == hashes for path, hashes in done.items())
    assert {result.state for result in read_summary(home.family()).values()} == {"done"}


def test_a_run_with_nothing_to_do_waits_for_no_server(home: Home, first: str) -> None:
    before = tree_hash(home.folder / "out")
    (home.folder / "prefect" / "server.log").unlink()
    said = home.run()
    assert "Family tiny" in said and "page" in said
    assert not (home.folder / "prefect" / "server.log").exists()
    assert tree_hash(home.folder / "out") == before


def test_a_changed_policy_runs_again_and_nothing_else(home: Home, first: str) -> None:
    home.change(policies=POLICIES | {"sq": {"plan": {"policy": "sq", "head_bits": 8}}, "rtn": POLICIES["rtn"]})
    home.change(exclude=["seven rwkvquant", "six rwkvquant"])
    said = home.run()
    assert "2 of 4 cells to do" in said
    plan = json.loads((home.folder / "out" / "six" / "sq" / "plan.json").read_text())
    head = next(row for row in plan["tensors"] if row["name"] == "head.weight")
    assert head["bits_per_weight"] < 9


def test_two_runs_on_one_family_are_refused(home: Home, first: str) -> None:
    from rwkvq.files import run_lock

    home.change(settings=home.family().file.settings | {"seed": 1})
    with run_lock(home.folder / "out"):
        said = home.run(code=1)
    assert "another run is using this folder" in said.splitlines()[-1]
