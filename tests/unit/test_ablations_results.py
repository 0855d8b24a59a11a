"""Rows of results: the table, statistics over rows, the page and its figures."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from rwkvq.ablations.arms import lowest
from rwkvq.ablations.figures import CHARTS, Chart, svg
from rwkvq.ablations.page import collect, figures, markdown
from rwkvq.ablations.results import ResultRow, key_of, read_rows, write_rows
from rwkvq.ablations.statistics import bootstrap, leak_gain, spearman, spreads, transfers
from rwkvq.ablations.study import Study
from rwkvq.ablations.tables import kl_text
from rwkvq.errors import EvaluationError


def row(setting: str, kl: float, *, model: str = "a", seed: int = 0, experiment: str = "E2") -> ResultRow:
    return ResultRow(
        experiment,
        model,
        seed,
        setting,
        {"share": 0.5, "by": "count", "rule": "fixed"},
        "text",
        1024,
        3.3,
        3.4,
        0.5,
        kl,
        0.001,
        0.2,
        3.0,
        20.0,
        0.8,
        (kl, kl),
        (kl - 0.01, kl + 0.01),
        (-1.5, -2.5),
    )


ROWS = [
    row("one", 0.05),
    ResultRow("E16", "a", 0, "sq", {"line": "sq"}, figures={"quantize": 3.5, "matrix_weights": 9}),
]


def test_pages_have_the_models_in_the_order_of_the_file(tmp_path: Path) -> None:
    for model in ("c", "a", "b"):
        write_rows(tmp_path / "rows" / f"E2-{model}-0.parquet", [row("one", 0.05, model=model)])
    chosen = Study(out=str(tmp_path), models={"a": None}, order=("b", "a", "c"))
    assert [found.model for found in collect(chosen)] == ["b", "a", "c"]


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_rows(path, ROWS, "a key")
    assert read_rows(path) == ROWS
    assert key_of(path) == "a key"


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_rows(tmp_path / name, ROWS, "key")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing PAR1"])
def test_a_damaged_table_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=r"rows\.parquet: not a readable table"):
        read_rows(path)
    assert key_of(path) is None


def test_no_table_has_no_key(tmp_path: Path) -> None:
    assert key_of(tmp_path / "none.parquet") is None


def test_the_lowest_scores_make_the_share() -> None:
    scores, sizes = {"a": 3.0, "b": 1.0, "c": 2.0}, {"a": 1, "b": 2, "c": 1}
    assert lowest(scores, sizes, 0.0) == set()
    assert lowest(scores, sizes, 0.5) == {"b"}
    assert lowest(scores, sizes, 0.6) == {"b", "c"}
    assert lowest(scores, sizes, 1.0) == {"a", "b", "c"}


def test_rank_correlation_has_its_sign() -> None:
    assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 1, 1], [3, 2, 1]) == 0.0


def test_an_interval_holds_the_mean_and_is_seeded() -> None:
    found = bootstrap([0.1, 0.2, 0.3, 0.4])
    assert found.mean == pytest.approx(0.25)
    assert found.low < 0.25 < found.high
    assert bootstrap([0.1, 0.2, 0.3, 0.4]) == found
    assert bootstrap([0.7]).low == bootstrap([0.7]).high == 0.7


def test_differences_are_paired_by_window() -> None:
    rows = [row("ours", 0.05), row("theirs", 0.08), row("ours", 0.06, seed=1), row("theirs", 0.09, seed=1)]
    ours, theirs = spreads(rows, "ours")
    assert ours.difference is None and ours.values == pytest.approx((0.05, 0.06))
    assert theirs.difference is not None
    # every window differs by 0.03 in both seeds, however much windows differ from each other
    assert theirs.difference.low == pytest.approx(0.03) and theirs.difference.high == pytest.approx(0.03)


def test_a_leak_is_what_words_gain_from_their_own_half() -> None:
    # calibration on the first half helps its two words by 1, on the second its two by 2, whatever else differs
    first, second = (-4.0, -6.0, -7.0, -9.0), (-5.0, -7.0, -5.0, -7.0)
    found = leak_gain([(first, second)])
    assert found.mean == pytest.approx(1.5) and found.low <= 1.5 <= found.high


def test_a_setting_is_chosen_on_the_other_models() -> None:
    values = {"a": (0.1, 0.2, 0.3), "b": (0.3, 0.2, 0.1), "c": (0.3, 0.1, 0.2)}
    rows = [row(name, kl, model=model) for model, kls in values.items() for name, kl in zip("xyz", kls, strict=True)]
    found = {item.model: item for item in transfers(rows)}
    # b and c together like z (1 and 2 times their best) as much as y (2 and 1): the first of them
    assert (found["a"].chosen, found["a"].best) == ("y", "x")
    assert found["a"].loss == pytest.approx(1.0)
    assert transfers(rows[:3]) == []


def test_one_seed_has_an_error_and_several_a_range() -> None:
    assert kl_text([row("one", 0.05)]) == "0.0500 ± 0.0010"
    assert kl_text([row("one", 0.05), row("one", 0.07, seed=1)]) == "0.0600 (0.0500–0.0700)"


def test_a_chart_is_a_document_that_holds_its_points() -> None:
    chart = Chart("x & y", "z", {"one": [(0.0, 0.1), (1.0, 0.2)], "two <": [(0.5, 0.15)]})
    root = ET.fromstring(svg(chart))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}polyline")) == 2 and len(root.findall(f"{space}circle")) == 3
    assert "two <" in [text.text for text in root.iter(f"{space}text")]
    assert svg(chart) == svg(chart)


def test_the_page_has_a_section_for_what_was_measured() -> None:
    page = markdown(ROWS, "ablations.parquet")
    assert "## E2: Share of SQ" in page and "## E16: Cost" in page and "## E3" not in page
    assert "0.0500 ± 0.0010" in page and "1024 tokens of text" in page
    assert list(figures(ROWS)) == ["ablation-E2"]
    assert set(CHARTS) <= {"E2", "E5", "E11", "E13", "E20"}
