"""Experiments on a tiny model: what is measured, what is kept, and the flow as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rwkvq.ablations import measure
from rwkvq.ablations.arms import open_arms
from rwkvq.ablations.cases import Case, line_case
from rwkvq.ablations.measure import Texts
from rwkvq.ablations.results import ResultRow, read_rows
from rwkvq.ablations.study import Study, load_study
from rwkvq.ablations.table import CASES
from rwkvq.artifact.reader import open_artifact
from rwkvq.engine.model import Engine
from rwkvq.errors import ArtifactError
from rwkvq.evaluation.divergence import compare_on_text
from rwkvq.plan.bits import totals
from tests.integration.conftest import SharedPool
from tests.small import tree_hash
from tests.small_study import run_lines, tiny_study, write_study

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study(pool_of_session: None, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study whose lines `sq` and `vq` are done."""
    made = tiny_study(tmp_path_factory.mktemp("study"), "E2", "E3", "E5", "E7", "E17", version="x060")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwkvq.run.WorkerPool", SharedPool)
        run_lines(made, ("sq", "vq"))
    return made


def run(study: Study, experiment: str) -> tuple[dict[str, Any], list[ResultRow], list[Mapping[str, Any]]]:
    """Measure one experiment in this process; return its answer, its rows and what it told."""
    events: list[Mapping[str, Any]] = []
    job = {"study": study.model_dump(mode="json"), "experiment": experiment, "model": "tiny", "seed": 0}
    answer = measure.run(job, events.append)
    return answer, read_rows(study.rows_of(experiment, "tiny", 0)), events


def test_the_ends_of_the_shares_are_the_artifacts(study: Study) -> None:
    _, rows, _ = run(study, "E2")
    by = {row.setting: row for row in rows}
    assert len(by) == len(rows) == 22
    source = study.run_of("tiny", 0, "sq")
    engines = {line: Engine(open_artifact(study.run_of("tiny", 0, line).artifact)) for line in ("sq", "vq")}
    arms = open_arms(study, "tiny", 0, ("sq", "vq"))
    ids = Texts(arms).ids("text", CASES["E2"](arms)[0].subject)
    measured = compare_on_text(Engine(source.checkpoint), engines, ids)
    for setting, line in (("0% by count", "vq"), ("100% by weights", "sq")):
        assert by[setting].kl == pytest.approx(measured[line].kl, rel=1e-9)
        assert by[setting].matrix_bits == pytest.approx(totals(engines[line].source.plan).matrix_bits)  # type: ignore[attr-defined]
    assert by["0% by count"].sq_share == 0.0 and by["100% by count"].sq_share == 1.0


def test_what_is_measured_is_kept(study: Study) -> None:
    _, before, _ = run(study, "E2")
    answer, _, events = run(study, "E2")
    assert answer["kept"] and not events
    study.rows_of("E2", "tiny", 0).unlink()
    answer, rows, events = run(study, "E2")
    assert (answer["measured"], answer["rows"], events) == (0, 22, [])
    assert rows == before


def test_a_killed_experiment_goes_on_where_it_stopped(study: Study) -> None:
    run(study, "E2")
    study.rows_of("E2", "tiny", 0).unlink()
    lost = sorted(study.measured.glob("*.json"))[0]
    content = lost.read_bytes()
    lost.unlink()
    answer, _, events = run(study, "E2")
    assert answer["measured"] >= 1 and events[-1]["done"] == events[-1]["total"] == answer["measured"]
    assert lost.read_bytes() == content


def test_other_windows_are_measured_anew(study: Study, tmp_path: Path) -> None:
    run(study, "E2")
    settings = {**study.settings, "evaluate": {**study.settings["evaluate"], "windows": 2}}
    before = study.rows_of("E2", "tiny", 0).read_bytes()
    answer, rows, _ = run(study.model_copy(update={"settings": settings}), "E2")
    assert answer["measured"] > 0 and {row.tokens for row in rows} == {2 * 48}
    study.rows_of("E2", "tiny", 0).write_bytes(before)


def test_equal_cases_of_two_experiments_are_measured_once(study: Study) -> None:
    run(study, "E2")
    count = len(list(study.measured.glob("*.json")))
    arms = open_arms(study, "tiny", 0, ("sq", "vq"))
    texts = Texts(arms)
    keys = {measure.measurement_key(arms, texts, case) for case in CASES["E7"](arms)}
    known = {path.stem for path in study.measured.glob("*.json")}
    answer, _, _ = run(study, "E7")
    assert len(list(study.measured.glob("*.json"))) == count + len(keys - known)
    assert answer["rows"] == 19


def test_the_same_tokens_in_longer_windows_are_another_measurement(study: Study) -> None:
    arms = open_arms(study, "tiny", 0, ("sq", "vq"))
    texts = Texts(arms)
    short, long = line_case("vq"), line_case("vq", "long")
    assert texts.ids("text", short.subject).flatten().equal(texts.ids("long", long.subject).flatten())
    assert measure.measurement_key(arms, texts, short) != measure.measurement_key(arms, texts, long)


def test_labels_are_unique_and_shares_are_met(study: Study) -> None:
    arms = open_arms(study, "tiny", 0, ("sq", "vq"))
    for key in ("E2", "E3", "E5", "E6", "E7", "E17"):
        cases: list[Case] = CASES[key](arms)
        assert len({case.label for case in cases}) == len(cases), key
    total = sum(arms.sizes.values())
    largest = max(arms.sizes.values())
    for case in CASES["E5"](arms):
        if isinstance(target := case.parameters["share"], float):
            scalar = sum(arms.sizes[name] for name, lines in case.subject.choice.items() if lines == ("sq",))
            assert 0 <= scalar - target * total < largest, case.label


def test_row_blocks_lose_no_more_than_matrices(study: Study) -> None:
    from rwkvq.ablations.row_blocks import block_losses

    losses = block_losses(open_arms(study, "tiny", 0, ("sq", "vq")))
    by_block = sum(min(pair) for pairs in losses.values() for pair in pairs)
    by_matrix = sum(min(map(sum, zip(*pairs, strict=True))) for pairs in losses.values())
    assert 0 < by_block < by_matrix


def test_a_missing_line_is_named(study: Study) -> None:
    with pytest.raises(ArtifactError, match="sq-symmetric"):
        run(study, "E4")


def flow(folder: Path, *options: str, code: int = 0) -> str:
    """Run the flow to its end; return what it said."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "DO_NOT_TRACK"))}
    done = subprocess.run(
        [sys.executable, "-m", "flows.ablations", str(folder / "study.yaml"), *options],
        cwd=REPOSITORY,
        env=kept | {"PREFECT_HOME": str(folder / "prefect"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr + done.stdout


def test_the_flow_runs_lines_and_experiments_and_does_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("prefect")
    write_study(tmp_path)
    chosen = ("--experiment", "E18", "--experiment", "E7", "--seed", "0", "--page", str(tmp_path / "page.md"))
    said = flow(tmp_path, *chosen)
    assert "E7 tiny seed 0: 19 rows" in said and "tiny vq seed-0" in said
    page = (tmp_path / "page.md").read_text()
    assert "## E7" in page and "## E18" in page
    study = load_study(tmp_path / "study.yaml")
    assert {row.experiment for row in read_rows(study.results)} == {"E7", "E18"}
    assert read_rows(tmp_path / "page.parquet") == read_rows(study.results)
    before = tree_hash(study.folder)
    said = flow(tmp_path, *chosen)
    assert "0 of 2 cells to do" in said and "E7 tiny seed 0: up to date" in said
    assert tree_hash(study.folder) == before


def test_the_flow_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("prefect")
    write_study(tmp_path)
    said = flow(tmp_path, "--experiment", "E15", code=1)
    assert "no experiment 'E15'" in said
    assert "E17" in flow(tmp_path, "--dry-run") and "--windows" in flow(tmp_path, "--help")
    assert not (tmp_path / "out").exists()
