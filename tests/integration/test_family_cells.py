"""A family run in this process, cell by cell as DVC does it: what is shared, kept, previewed and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rwkvq.family.costs import Cost, estimate_costs, longest_first
from rwkvq.family.family import Family, load_family
from rwkvq.family.preview import UP_TO_DATE, preview_family
from rwkvq.family.results import CellResult, is_complete, read_results, read_summary, reasons_to_run, write_results
from rwkvq.files import write_json
from tests.commands import command, refused
from tests.small import tree_hash
from tests.small_family import write_family

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("shared_workers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One family that the tests of this module run step by step, in their order."""
    path = tmp_path_factory.mktemp("family")
    write_family(path, models={"seven": {"model": str(path / "seven" / "model.pth")}})
    return path


@pytest.fixture
def family(folder: Path) -> Family:
    return load_family(folder / "family.yaml")


def test_a_dry_run_says_what_would_run_and_writes_nothing(capsys: Capture, family: Family) -> None:
    preview = preview_family(family)
    assert [item.why for item in preview.cells] == ["plan: not run yet"] * 3
    assert "windows: not run yet" in preview.shared[0].why
    assert all(item.exact and item.file_bytes > 100_000 and item.peak_bytes > 3e8 for item in preview.cells)
    assert preview.seconds == pytest.approx(sum(item.seconds for item in (*preview.shared, *preview.cells)))
    assert not family.out.exists()
    shown = command(capsys, "family", "plan", family.path, "--json")
    assert [cell["why"] for cell in json.loads(shown.out)["cells"]] == ["plan: not run yet"] * 3


def test_a_cell_before_its_shared_work_names_it(capsys: Capture, family: Family) -> None:
    line = refused(command(capsys, "family", "cell", family.path, "seven", "sq"), family.out, "waits for")
    assert "windows" in line


def test_shared_work_is_done_once(capsys: Capture, family: Family) -> None:
    assert command(capsys, "family", "shared", family.path, "seven").code == 0
    shared = family.out / "shared" / "seven"
    before = tree_hash(shared)
    assert {"windows.parquet", "proxies.parquet", "activations/block-001.parquet"} <= before.keys()
    for cell in family.cells:
        assert command(capsys, "family", "cell", family.path, cell.model, cell.policy).code == 0
        own = {path.name for path in cell.run.folder.iterdir()}
        assert not own & {"windows.parquet", "proxies.parquet", "activations"}
    assert tree_hash(shared) == before
    assert reasons_to_run(family) == {}


def test_the_page_shows_every_cell(capsys: Capture, family: Family) -> None:
    assert not is_complete(family)  # the page is missing
    assert command(capsys, "family", "page", family.path).code == 0
    assert is_complete(family)
    page = family.page.read_text()
    assert all(f'href="seven/{policy}/report.html"' in page for policy in ("rtn", "sq", "rwkvquant"))
    rows = family.table.read_text().splitlines()
    assert len(rows) == 4 and rows[0].startswith("model,policy,")
    assert json.loads(family.metrics.read_text())


def test_the_settings_that_changed_are_the_reason(folder: Path) -> None:
    reasons = reasons_to_run(load_family(folder / "family.yaml", ["quantize.bits=4"]))
    assert set(reasons) == {"seven rtn", "seven sq", "seven rwkvquant"}
    assert all("quantize.bits 3 -> 4" in reason for reason in reasons.values())


def test_a_preview_of_finished_work_costs_nothing(family: Family) -> None:
    preview = preview_family(family)
    assert {item.why for item in (*preview.cells, *preview.shared)} == {UP_TO_DATE}
    assert preview.seconds == 0


def test_measured_seconds_order_the_cells(family: Family) -> None:
    costs = estimate_costs(family.cells)
    assert all(cost.measured for cost in costs.values())
    times = family.cell("seven", "rtn").run.timings("plan")
    write_json(times, {name: 100.0 for name in json.loads(times.read_text())})
    slow = longest_first(family.cells, estimate_costs(family.cells))
    assert slow[0].policy == "rtn"


def test_what_is_not_measured_is_estimated_by_what_is(family: Family) -> None:
    times = family.cell("seven", "sq").run.timings("plan")
    kept = times.read_text()
    times.unlink()
    try:
        costs = estimate_costs(family.cells)
        assert not costs["seven sq"].measured and costs["seven rtn"].measured
        assert costs["seven sq"].seconds > 0
    finally:
        times.write_text(kept)


def test_equal_costs_keep_the_order_of_the_file(family: Family) -> None:
    costs = {cell.name: Cost(1.0, True) for cell in family.cells}
    assert longest_first(family.cells, costs) == list(family.cells)


def test_a_cell_that_cannot_run_is_a_reason_and_costs_nothing(folder: Path, tmp_path: Path) -> None:
    family = load_family(folder / "family.yaml")
    gone = replace(
        family.cells[0], settings=family.cells[0].settings.model_copy(update={"model": str(tmp_path / "a.pth")})
    )
    broken = replace(family, cells=(gone, *family.cells[1:]))
    assert "no such file" in reasons_to_run(broken)[gone.name]
    assert estimate_costs(broken.cells)[gone.name] == Cost(0.0, False)


def test_a_failed_cell_is_remembered_until_it_is_done(family: Family) -> None:
    results = list(read_results(family))
    results[1] = CellResult("seven", "sq", "failed", "the disk is full", 3.0)
    data = write_results(family, results)
    assert read_summary(family)["seven sq"].error == "the disk is full"
    assert "the disk is full" in family.page.read_text()
    assert [cell.state for cell in data.cells] == ["done", "failed", "done"]
    manifest = family.cell("seven", "sq").run.folder / "manifests" / "evaluate.json"
    kept = manifest.read_text()
    manifest.unlink()
    assert read_results(family)[1].state == "failed"
    manifest.write_text(kept)
    assert read_results(family)[1].state == "done"
    write_results(family, read_results(family))


def test_names_that_do_not_exist_are_refused(capsys: Capture, family: Family) -> None:
    refused(command(capsys, "family", "shared", family.path, "nine"), family.path, "no model 'nine'; models: seven")
    refused(command(capsys, "family", "cell", family.path, "seven", "x"), family.path, "no cell 'seven' 'x'; cells:")
