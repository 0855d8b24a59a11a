"""The page: complete, self-contained, escaped, small, deterministic."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from rwkvq.report.data import Budget, ReportData
from rwkvq.report.html import render
from tests.made_up_report import report

HOSTILE = "<script>alert('x')</script>\"onload=\"&amp;"


class _Reader(HTMLParser):
    """Collects tags, attributes and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def data() -> ReportData:
    return report()


@pytest.fixture(scope="module")
def page(data: ReportData) -> str:
    return render(data)


def test_the_page_needs_nothing_from_elsewhere(page: str) -> None:
    reader = _Reader(page)
    assert not {"script", "iframe", "img", "object", "embed"} & set(reader.tags)
    links = [value for name, value in reader.attributes if name in ("href", "src", "xlink:href")]
    assert all(value is not None and value.startswith(("#", "data:")) for value in links)
    assert "http" not in page.replace("http-equiv", "") and "url(" not in page and "@import" not in page
    assert not any(name.startswith("on") for name, _ in reader.attributes)


def test_the_page_suits_a_phone_and_a_dark_screen(page: str) -> None:
    assert 'name="viewport" content="width=device-width,initial-scale=1"' in page
    assert "prefers-color-scheme:dark" in page


def test_every_colour_that_is_used_is_defined_for_light_and_dark(page: str) -> None:
    light, dark = re.findall(r":root\{([^}]*)\}", page)
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert used <= set(re.findall(r"(--[\w-]+):", light))
    assert used <= set(re.findall(r"(--[\w-]+):", dark))


def test_equal_reports_give_equal_bytes(page: str) -> None:
    assert render(report()) == page


def test_all_sections_and_figures_are_there(data: ReportData, page: str) -> None:
    text = " ".join(_Reader(page).words)
    for title in (
        "Quality",
        "Honest bits per weight",
        "Where the bytes are",
        "Proxies and choice",
        "Bits by block and tensor",
        "Error by block and tensor",
        "Wall time by stage",
        "Every tensor",
        "Provenance",
    ):
        assert title in text
    for figure in ("18.9 MB", "10.8 MB", "3.481", "3.602", "9.145", "0.05532", "± 0.00088", "87.16", "29.20", "20.4"):
        assert figure in text
    assert "8f1d" * 16 in text and "settings.quantize.damping" in text


def test_every_tensor_stands_in_the_table_once(data: ReportData, page: str) -> None:
    table = page[page.index("Every tensor") : page.index("Provenance")]
    names = re.findall(r'<th scope="row">([^<]+)', table)
    assert names == [row.name for row in data.tensors]


@pytest.mark.parametrize("layers", [6, 61])
def test_the_page_stays_below_a_megabyte(layers: int) -> None:
    assert len(render(report(layers=layers)).encode()) < 1_000_000


def test_every_text_is_escaped(data: ReportData) -> None:
    assert data.proxies is not None and data.evaluation is not None and data.calibration is not None
    hostile = replace(
        data,
        model=HOSTILE,
        policy=HOSTILE,
        preset=HOSTILE,
        quality=tuple(replace(row, name=HOSTILE + row.name) for row in data.quality),
        evaluation=replace(data.evaluation, text=HOSTILE, lambada=HOSTILE),
        calibration=replace(data.calibration, source=HOSTILE),
        disjointness=tuple(replace(proof, name=HOSTILE) for proof in data.disjointness),
        proxies=replace(
            data.proxies,
            gap_mode=HOSTILE,
            decision=HOSTILE,
            rows=tuple(replace(row, name=HOSTILE) for row in data.proxies.rows),
        ),
        tensors=tuple(
            replace(row, name=HOSTILE, short=HOSTILE + row.short, format=HOSTILE, method=HOSTILE, reason=HOSTILE)
            for row in report(layers=16).tensors
        ),
        stages=tuple(replace(stage, name=HOSTILE) for stage in data.stages),
        provenance={HOSTILE: {"deep": [HOSTILE]}},
    )
    reader = _Reader(render(hostile))
    assert "script" not in reader.tags
    assert not any(name.startswith("on") for name, _ in reader.attributes)


def test_a_budget_stands_in_place_of_the_proxies(data: ReportData, page: str) -> None:
    assert "<h2>Proxies and choice</h2>" in page and "<h2>Budget</h2>" not in page
    asked = render(replace(data, policy="budget", budget=Budget("a weight file of <1GB>", "quality", 0.0174)))
    assert "<h2>Proxies and choice</h2>" not in asked and "<h2>Budget</h2>" in asked
    assert "predicted 0.01740" in asked and "a weight file of &lt;1GB&gt;" in asked


def test_parts_that_were_not_run_leave_no_empty_section(data: ReportData) -> None:
    bare = replace(
        data,
        quality=(),
        evaluation=None,
        calibration=None,
        disjointness=(),
        proxies=None,
        tensors=tuple(row for row in data.tensors if row.method == "keep"),
        stages=(),
    )
    text = " ".join(_Reader(render(bare)).words)
    for title in ("Quality", "Proxies", "Bits by block", "Wall time"):
        assert title not in text
    assert "Honest bits per weight" in text


def test_leaked_text_is_a_warning(data: ReportData) -> None:
    leaked = replace(data, disjointness=(replace(data.disjointness[0], shared=3),))
    assert 'class="note warn"' in render(leaked)
    assert 'class="note warn"' not in render(data)
