"""The figures of a family run as rows, as CSV, as numbers and as Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import pytest

from rwkvq.report.data import Estimate
from rwkvq.report.family import CellData, FamilyData, family_csv, family_markdown, family_metrics, family_table
from rwkvq.report.family.figures import (
    are_apart,
    clear_best,
    counted,
    family_headlines,
    measured_sentences,
    ranked,
    total_seconds,
)
from rwkvq.report.family.tables import model_rows
from tests.made_up_family import cell, family, with_failures


@pytest.fixture(scope="module")
def data() -> FamilyData:
    return family()


def with_kl(item: CellData, value: float, error: float | None) -> CellData:
    assert item.report is not None
    reference, ours = item.report.quality
    return replace(item, report=replace(item.report, quality=(reference, replace(ours, kl=Estimate(value, error)))))


def two(first: tuple[float, float | None], second: tuple[float, float | None]) -> tuple[CellData, CellData]:
    return with_kl(cell("m", "one", 2, 64), *first), with_kl(cell("m", "two", 2, 64), *second)


def test_the_best_is_stressed_only_beyond_both_standard_errors() -> None:
    clear = two((0.050, 0.001), (0.053, 0.001))
    assert clear_best(clear, "kl") is clear[0]
    assert clear_best(two((0.050, 0.001), (0.052, 0.001)), "kl") is None
    assert clear_best(two((0.050, None), (0.090, 0.001)), "kl") is None
    assert clear_best(clear[:1], "kl") is None


def test_the_best_must_be_apart_from_all_others() -> None:
    near, far = two((0.0505, 0.001), (0.09, 0.001))
    assert clear_best((with_kl(cell("m", "zero", 2, 64), 0.05, 0.001), far, near), "kl") is None


def test_more_agreement_is_better_and_less_divergence_is_better(data: FamilyData) -> None:
    cells = data.cells_of("rwkv7-9m")
    assert [item.policy for item, _ in ranked(cells, "kl")] == ["rwkvquant", "sq", "rtn"]
    values = [value.value for _, value in ranked(cells, "top1")]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_are_not_finite_are_never_the_best(value: float) -> None:
    one, two_ = two((value, 0.0), (0.05, 0.001))
    assert [item for item, _ in ranked((one, two_), "kl")] == [two_]
    assert not are_apart(Estimate(0.05, 0.001), Estimate(value, math.nan))


def test_every_cell_is_a_row_with_the_float_model_first(data: FamilyData) -> None:
    rows = model_rows(data.cells_of("rwkv7-9m"))
    assert [row.texts[0] for row in rows] == ["float", "rtn", "sq", "rwkvquant"]
    assert rows[0].cell is None and rows[0].best == frozenset()
    assert rows[3].best == {2}
    assert rows[3].texts[2] == "0.0557 ± 0.0010"
    assert rows[3].texts[1] == "10.6 MB"


def test_a_cell_without_a_result_shows_its_state(data: FamilyData) -> None:
    table = family_table(with_failures(data))
    rows = {row[:2]: row[2:] for row in table.rows}
    assert len(rows) == 12
    assert rows[("rwkv7-9m", "sq")] == ("failed", "–", "–", "–", "–", "–", "31 s")
    assert rows[("rwkv7-26m", "rwkvquant")][0] == "not run"
    assert all(len(row) == len(table.columns) == len(table.align) for row in table.rows)


def test_the_csv_has_one_row_a_finished_cell_and_fixed_formats(data: FamilyData) -> None:
    text = family_csv(with_failures(data))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == [
        "model",
        "policy",
        "file_mb",
        "matrix_bits",
        "body_bits",
        "file_bits",
        "kl",
        "kl_se",
        "ppl",
        "top1",
        "lambada_acc",
    ]
    assert len(rows) == 7
    assert rows[1]["policy"] == "rwkvquant"
    assert rows[1]["matrix_bits"] == "3.481000"
    kl = data.cells[2].kl
    assert kl is not None
    assert float(rows[1]["kl"]) == pytest.approx(kl.value, rel=1e-6)
    assert family_csv(family()) == family_csv(data)


def test_what_was_not_measured_is_empty_in_the_csv(data: FamilyData) -> None:
    first = data.cells[0]
    assert first.report is not None
    bare = replace(first, report=replace(first.report, quality=()))
    (row,) = csv.DictReader(io.StringIO(family_csv(replace(data, cells=(bare,)))))
    assert row["kl"] == row["ppl"] == row["lambada_acc"] == ""
    assert row["file_bits"] != ""
    (row,) = csv.DictReader(io.StringIO(family_csv(replace(data, cells=(with_kl(first, math.nan, math.inf),)))))
    assert row["kl"] == row["kl_se"] == ""


def test_names_with_commas_and_quotes_survive_the_csv(data: FamilyData) -> None:
    odd = replace(data.cells[0], policy='a,"b"\nc')
    (row,) = csv.DictReader(io.StringIO(family_csv(replace(data, cells=(odd,)))))
    assert row["policy"] == 'a,"b"\nc'


def test_the_metrics_are_flat_finite_and_without_times(data: FamilyData) -> None:
    values = family_metrics(with_failures(data))
    assert (values["cells.done"], values["cells.failed"], values["cells.not_run"]) == (7, 1, 1)
    assert values["rwkv7-9m.rwkvquant.matrix_bits"] == 3.481
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in values.values())
    assert not any("second" in name or "time" in name for name in values)
    assert "rwkv7-9m.sq.kl" not in values
    json.dumps(values, allow_nan=False)


def test_times_change_neither_csv_nor_metrics(data: FamilyData) -> None:
    slower = replace(data, cells=tuple(replace(item, seconds=1e6) for item in data.cells))
    assert family_csv(slower) == family_csv(data)
    assert family_metrics(slower) == family_metrics(data)


def test_the_markdown_holds_the_table_the_failures_and_the_way_on(data: FamilyData) -> None:
    text = family_markdown(with_failures(data))
    assert "| rwkv7-9m | rwkvquant | 10.6 MB | **0.0557** ± 0.0010 |" in text
    assert "- **rwkv7-9m sq**: rwkv7-9m.pth:" in text
    assert "- **rwkv7-26m rwkvquant**: quantize: was not run before" in text
    assert "only what is missing" in text
    assert "## Failed" not in family_markdown(data)


def test_names_cannot_break_the_markdown(data: FamilyData) -> None:
    odd = replace(data.cells[0], model="a|b\n# c", policy="<b>*x*", state="failed", report=None, error="`|` <img>")
    text = family_markdown(replace(data, name="# x\n\n<script>", cells=(odd,)))
    assert "<script>" not in text.replace(r"\<script\>", "")
    assert r"a\|b \# c" in text
    assert not any(line.startswith("# c") for line in text.splitlines())


def test_the_headlines_count_states_and_name_the_best_of_every_model(data: FamilyData) -> None:
    cards = family_headlines(with_failures(data))
    assert cards[0].figures == (("done", "7"), ("failed", "1"), ("not run", "1"))
    assert cards[1].title == "rwkv7-9m: lowest KL"
    assert cards[1].figures == (("rwkvquant", "0.0557"),)
    assert cards[1].remark == "± 0.0010, 10.6 MB, 3.481 matrix bits"


def test_a_headline_admits_what_cannot_be_told_apart() -> None:
    close = two((0.050, 0.001), (0.051, 0.001))
    (_, card) = family_headlines(FamilyData("f", close, {}))
    assert card.remark.endswith("not told apart from two")


def test_times_add_up_over_cells_and_are_left_out_if_there_are_none(data: FamilyData) -> None:
    cells = tuple(replace(item, seconds=seconds) for item, seconds in zip(data.cells, (1.0, None, 2.5), strict=False))
    assert total_seconds(replace(data, cells=cells)) == 3.5
    idle = replace(data, cells=tuple(replace(item, seconds=None) for item in data.cells))
    assert total_seconds(idle) is None
    assert family_headlines(idle)[0].remark == ""


def test_sentences_that_hold_for_all_are_said_once(data: FamilyData) -> None:
    sentences = [text for text, _ in measured_sentences(data)]
    assert len(sentences) == len(set(sentences)) == 5
    first = data.cells[0]
    assert first.report is not None and first.report.evaluation is not None
    other = replace(first, report=replace(first.report, evaluation=replace(first.report.evaluation, windows=8)))
    split = [text for text, _ in measured_sentences(replace(data, cells=(other, *data.cells[1:])))]
    assert any(text.startswith("rwkv7-9m rtn: Perplexity") for text in split)
    assert any(text.startswith("rwkv7-9m sq, rwkv7-9m rwkvquant, rwkv6-10m") for text in split)


def test_counts_have_their_plural() -> None:
    assert [counted(1, "policy"), counted(2, "policy"), counted(3, "model")] == ["1 policy", "2 policies", "3 models"]
