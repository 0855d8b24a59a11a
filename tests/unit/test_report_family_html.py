"""The family page: complete, self-contained, escaped, small, deterministic."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from rwkvq.report.data import Estimate, TensorRow
from rwkvq.report.family import CellData, FamilyData, render
from tests.made_up_family import MODELS, POLICIES, cell, family, with_failures

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

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def links(self) -> list[str]:
        return [value or "" for name, value in self.attributes if name in ("href", "src", "xlink:href", "action")]


@pytest.fixture(scope="module")
def data() -> FamilyData:
    return family()


@pytest.fixture(scope="module")
def page(data: FamilyData) -> str:
    return render(data)


def with_cells(data: FamilyData, *cells: CellData) -> FamilyData:
    return replace(data, cells=cells)


def test_the_page_needs_nothing_from_elsewhere(data: FamilyData, page: str) -> None:
    reader = _Reader(page)
    assert not {"script", "iframe", "img", "object", "embed", "form"} & set(reader.tags)
    pages = {item.page for item in data.cells}
    assert all(link.startswith(("#", "data:")) or link in pages for link in reader.links())
    assert "http" not in page.replace("http-equiv", "") and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page
    assert not any(name.startswith("on") for name, _ in reader.attributes)


def test_the_page_suits_a_phone_a_dark_screen_and_paper(page: str) -> None:
    assert 'name="viewport" content="width=device-width,initial-scale=1"' in page
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page


def test_every_colour_that_is_used_is_defined_for_light_and_dark(page: str) -> None:
    light, dark = re.findall(r":root\{([^}]*)\}", page)
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert used <= set(re.findall(r"(--[\w-]+):", light))
    assert used <= set(re.findall(r"(--[\w-]+):", dark))


def test_equal_runs_give_equal_bytes(page: str) -> None:
    assert render(family()) == page


def test_names_are_defined_once(page: str) -> None:
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names)) > 0
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(names)


def test_all_sections_are_there_and_every_cell_is_linked(data: FamilyData, page: str) -> None:
    reader = _Reader(page)
    for title in (
        "Quality against size",
        "Models and policies",
        "Bits and error by block and tensor",
        "Proxies and choice",
        "Wall time by stage",
        "Provenance",
    ):
        assert title in reader.text
    assert "Failures" not in reader.text
    assert {item.page for item in data.cells} <= set(reader.links())
    assert "3 models · 3 policies" in reader.text


def test_failures_say_what_why_what_is_kept_and_what_to_do(data: FamilyData) -> None:
    text = _Reader(render(with_failures(data))).text
    assert "Failures" in text
    assert "rwkv7-9m sq" in text
    assert "blocks.3.att.key.weight holds 4 values that are not finite; use an undamaged checkpoint" in text
    assert "Kept: windows, activations, proxies, plan." in text
    assert "The same command again does only what is missing" in text
    assert "not run: quantize: was not run before" in text


def test_an_error_of_many_lines_is_shown_on_one(data: FamilyData) -> None:
    broken = replace(data.cells[0], state="failed", report=None, error="first\n  second")
    assert "<p>first second</p>" in render(with_cells(data, broken))


@pytest.mark.parametrize(
    "target",
    [
        "javascript:alert(1)",
        " javascript:alert(1)",
        "JAVASCRIPT:alert(1)",
        "java\nscript:alert(1)",
        "https://example.org/a.html",
        "//example.org/a.html",
        "/etc/passwd",
        "\\\\host\\a.html",
        "data:text/html,x",
        "file:///a.html",
        "http://[bad",
    ],
)
def test_only_relative_pages_are_linked(data: FamilyData, target: str) -> None:
    page = render(with_cells(data, replace(data.cells[0], page=target)))
    assert "<a " not in page


def test_a_relative_page_with_unusual_letters_is_linked_safely(data: FamilyData) -> None:
    page = render(with_cells(data, replace(data.cells[0], page='a b/c"d#e.html')))
    assert '<a href="a%20b/c%22d%23e.html">' in page


def _hostile_cell(item: CellData) -> CellData:
    assert item.report is not None and item.report.proxies is not None and item.report.evaluation is not None
    assert item.report.calibration is not None
    report = replace(
        item.report,
        model=HOSTILE,
        policy=HOSTILE,
        preset=HOSTILE,
        quality=tuple(replace(row, name=HOSTILE + row.name) for row in item.report.quality),
        evaluation=replace(item.report.evaluation, text=HOSTILE, lambada=HOSTILE),
        calibration=replace(item.report.calibration, source=HOSTILE),
        disjointness=tuple(replace(proof, name=HOSTILE) for proof in item.report.disjointness),
        proxies=replace(
            item.report.proxies,
            gap_mode=HOSTILE,
            decision=HOSTILE,
            rows=tuple(replace(row, name=HOSTILE) for row in item.report.proxies.rows),
        ),
        tensors=tuple(replace(row, name=HOSTILE, short=HOSTILE + row.short) for row in item.report.tensors),
        stages=tuple(replace(stage, name=HOSTILE + stage.name) for stage in item.report.stages),
        provenance={HOSTILE: {"deep": [HOSTILE]}},
    )
    return replace(item, model=HOSTILE + item.model, policy=HOSTILE + item.policy, page=HOSTILE, report=report)


@pytest.mark.parametrize("layers", [2, 16])
def test_every_text_is_escaped(layers: int) -> None:
    cells = [_hostile_cell(cell(model, policy, layers, 64)) for model in MODELS[:2] for policy in POLICIES]
    broken = replace(cells[0], state="failed", report=None, error=HOSTILE, kept=(HOSTILE,))
    waiting = replace(cells[1], state="not run", report=None, error=HOSTILE)
    reader = _Reader(render(FamilyData(HOSTILE, (broken, waiting, *cells[2:]), {HOSTILE: HOSTILE})))
    assert "script" not in reader.tags
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    assert HOSTILE in reader.text


def test_the_page_of_three_small_models_is_small(page: str) -> None:
    assert len(page.encode()) < 250_000


def _all_quantized(item: CellData) -> CellData:
    """A cell whose element-wise weights are quantized too, each to another error."""
    assert item.report is not None

    def quantized(at: int, row: TensorRow) -> TensorRow:
        return replace(row, method="vq", format="vector", relative_error=10 ** -(1 + at * 7 % 30 / 10))

    rows = item.report.tensors
    tensors = tuple(row if row.block is None else quantized(at, row) for at, row in enumerate(rows))
    return replace(item, report=replace(item.report, tensors=tensors))


def test_the_page_of_deep_models_stays_below_three_megabytes() -> None:
    policies = (*POLICIES, "gptq", "vq", "budget")
    # five times the same model under other names: the size of the page does not mind
    cells = [_all_quantized(cell("m", policy, 61, 64)) for policy in policies]
    models = [f"rwkv7-{name}" for name in ("0.1b", "0.4b", "1.5b", "2.9b", "14b")]
    everything = tuple(replace(item, model=model) for model in models for item in cells)
    assert len(render(FamilyData("all", everything, {})).encode()) < 3_000_000


def test_parts_that_were_not_run_leave_no_empty_section(data: FamilyData) -> None:
    cells = []
    for item in data.cells:
        assert item.report is not None
        kept = tuple(row for row in item.report.tensors if row.method == "keep")
        report = replace(
            item.report,
            quality=(),
            evaluation=None,
            calibration=None,
            disjointness=(),
            proxies=None,
            tensors=kept,
            stages=(),
            provenance={},
        )
        cells.append(replace(item, report=report))
    text = _Reader(render(FamilyData("bare", tuple(cells), {}))).text
    for title in ("Quality against", "Proxies", "Bits and error", "Wall time", "Provenance"):
        assert title not in text
    assert "Models and policies" in text


@pytest.mark.parametrize(
    "run",
    [
        family(MODELS[:1]),
        family(policies=("rwkvquant",)),
        family(MODELS[:1], ("rtn",)),
        family(MODELS[:1], tuple(f"policy-{at}" for at in range(12))),
        FamilyData("nothing", (), {}),
    ],
    ids=["one model", "one policy", "one cell", "twelve policies", "no cell"],
)
def test_runs_of_any_shape_are_shown(run: FamilyData) -> None:
    text = _Reader(render(run)).text
    assert all(name in text for name in (*run.models, *run.policies))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_figures_that_cannot_be_drawn_are_named(data: FamilyData, value: float) -> None:
    first = data.cells[0]
    assert first.report is not None
    reference, ours = first.report.quality
    bad = replace(ours, kl=Estimate(value, value), perplexity=Estimate(value, value), top1=Estimate(value, None))
    report = replace(
        first.report, quality=(reference, bad), sizes=replace(first.report.sizes, matrix_bits=None, body_bits=value)
    )
    page = render(replace(data, cells=(replace(first, report=report, seconds=value), *data.cells[1:])))
    assert "Not shown: rtn (no KL)" in page
    assert "NaN" not in page and "nan%" not in page and "inf%" not in page


def test_leaked_text_is_a_warning_that_names_its_cell(data: FamilyData, page: str) -> None:
    first = data.cells[0]
    assert first.report is not None
    proofs = (replace(first.report.disjointness[0], shared=3), first.report.disjointness[1])
    leaked = replace(first, report=replace(first.report, disjointness=proofs))
    assert re.search(
        r'class="note warn">rwkv7-9m rtn: books_validation.txt: 3 of',
        render(replace(data, cells=(leaked, *data.cells[1:]))),
    )
    assert 'class="note warn"' not in page
