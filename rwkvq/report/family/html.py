"""A family run as one self-contained HTML page: no script, nothing loaded, equal input giving equal bytes."""

from __future__ import annotations

from html import escape
from urllib.parse import quote, urlsplit

from rwkvq.report.family.data import CellData, FamilyData
from rwkvq.report.family.figures import (
    RERUN,
    family_headlines,
    family_sentence,
    is_finite,
    kept_sentence,
    measured_sentences,
    reason_of,
)
from rwkvq.report.family.maps import cell_map, common_ends, is_quantized, median_error, plane_of
from rwkvq.report.family.provenance import fact_groups
from rwkvq.report.family.size_plot import size_panels
from rwkvq.report.family.style import family_style_sheet
from rwkvq.report.family.tables import ALIGN, BEST, COLUMNS, ModelRow, model_rows
from rwkvq.report.family.times import time_bars
from rwkvq.report.html import card_markup, cell_markup, document, head_markup, table_markup
from rwkvq.report.plots import MARK_SHAPES, MAX_BLOCKS_SIDE_BY_SIDE, is_mixed, plane_key, proxy_plane
from rwkvq.report.tables import Table
from rwkvq.report.text import NONE, bits_text, error_percent_text

_MAX_TITLED_MARKS = 500
"""Planes with more weights have no tooltips: they would be most of the page."""


def _link(page: str | None, text: str) -> str:
    """The text, as a link if `page` is a relative path; anything with a scheme or a host stays text."""
    if page is None:
        return escape(text)
    try:
        parts = urlsplit(page)
    except ValueError:
        return escape(text)
    if parts.scheme or parts.netloc or page.startswith("/") or "\\" in page:
        return escape(text)
    return f'<a href="{escape(quote(page))}">{escape(text)}</a>'


def _failures(data: FamilyData) -> str:
    failed, waiting = data.in_state("failed"), data.in_state("not run")
    if not failed and not waiting:
        return ""
    items = [
        f'<div class="failure"><p><b>{escape(cell.name)}</b></p><p>{escape(reason_of(cell))}</p>'
        f'<p class="note">{escape(kept_sentence(cell))}</p></div>'
        for cell in failed
    ]
    items += [
        f'<p class="note waiting"><b>{escape(cell.name)}</b> not run: {escape(reason_of(cell))}</p>' for cell in waiting
    ]
    title = "Failures" if failed else "Not run"
    return f'<section><h2>{title}</h2><p class="lead">{RERUN}</p>{"".join(items)}</section>'


def _size(data: FamilyData) -> str:
    if not any(is_finite(cell.kl) for cell in data.cells):
        return ""
    return (
        '<section><h2>Quality against size</h2><p class="lead">KL(float || quantized) in nats a token: lower is closer '
        "to the float model. Filled: no other policy of the model is both smaller and closer. Bars: ± one standard "
        f"error. Equal distances are equal ratios in all panels.</p>{size_panels(data)}</section>"
    )


def _model_row(row: ModelRow) -> str:
    cell = row.cell
    name = escape(row.texts[0]) if cell is None else _link(cell.page, row.texts[0])
    kind = ' class="base"' if cell is None else ' class="base failed"' if cell.state == "failed" else ""
    has_result = cell is None or cell.report is not None
    cells = []
    for at, text in enumerate(row.texts[1:], start=1):
        shown = cell_markup(text)
        if at in row.best:
            value, mark, error = shown.partition("<span")
            shown = f"<b>{value}</b>{mark}{error}"
        names = ["r"] if has_result or at != 1 else ["r", "state"]
        cells.append(f'<td class="{" ".join([*names, *["best"] * (at in row.best)])}">{shown}')
    return f'<tr{kind}><th scope="row">{name}{"".join(cells)}'


def _models(data: FamilyData) -> str:
    head = head_markup(Table(COLUMNS, (), ALIGN))
    bodies = []
    for model in data.models:
        lines = "".join(map(_model_row, model_rows(data.cells_of(model))))
        bodies.append(f'<tbody><tr class="group"><th colspan="{len(COLUMNS)}">{escape(model)}{lines}</tbody>')
    notes = "".join(
        f'<p class="note{" warn" if is_warning else ""}">{escape(text)}</p>'
        for text, is_warning in measured_sentences(data)
    )
    return (
        f'<section><h2>Models and policies</h2><div class="scroll"><table class="rows models">{head}{"".join(bodies)}'
        f'</table></div><p class="note">{BEST}</p>{notes}</section>'
    )


def _cell_maps(cell: CellData, cells: tuple[CellData, ...]) -> str:
    report = cell.report
    if report is None or not any(map(is_quantized, report.tensors)):
        return ""
    error = median_error(report)
    facts = [NONE if report.sizes.matrix_bits is None else f"{bits_text(report.sizes.matrix_bits)} matrix bits"]
    facts += [] if error is None else [f"median error {error_percent_text(error)} %"]
    layout = "two" if report.spec.layers <= MAX_BLOCKS_SIDE_BY_SIDE else "two deep"
    edges = " An orange edge marks scalar formats." if is_mixed(report.tensors) else ""
    bits, errors = (cell_map(report, measure, common_ends(cells, measure)) for measure in ("bits", "error"))
    return (
        f"<details><summary><b>{escape(cell.policy)}</b><span>{', '.join(facts)}</span></summary>"
        f'<div class="{layout}"><div><p class="lead">Bits per weight.{edges}</p>{bits}</div>'
        f'<div><p class="lead">Output error, %.</p>{errors}</div></div></details>'
    )


def _maps(data: FamilyData) -> str:
    groups = []
    for model in data.models:
        cells = data.cells_of(model)
        if shown := "".join(_cell_maps(cell, cells) for cell in cells):
            groups.append(f"<h3>{escape(model)}</h3>{shown}")
    if not groups:
        return ""
    return (
        '<section class="maps"><h2>Bits and error by block and tensor</h2><p class="lead">Stored bits per weight, and '
        "the output error on calibration inputs in % of the output's energy. Colours compare across the policies of a "
        f"model.</p>{''.join(groups)}</section>"
    )


def _plane_rule(deciding: list[CellData], decision: str, gap_mode: str) -> str:
    if not deciding:
        return f"No policy of this run decides by the proxies; gap mode {gap_mode}."
    others = f" Also decided by them: {', '.join(cell.policy for cell in deciding[1:])}." if deciding[1:] else ""
    gaps = "" if "gap_mode" in decision else f"; gap mode {gap_mode}"
    return f"Arms of {deciding[0].policy}: {decision}{gaps}.{others}"


def _planes(data: FamilyData) -> str:
    found = [(model, plane_of(data.cells_of(model))) for model in data.models]
    shown = [(model, *pair) for model, pair in found if pair is not None]
    if not shown:
        return ""
    pictures: list[str] = []
    for model, plane, deciding in shown:
        picture = proxy_plane(
            plane, shapes="" if pictures else MARK_SHAPES, has_titles=len(plane.rows) <= _MAX_TITLED_MARKS
        )
        key = plane_key(plane) if deciding else ""
        rule = _plane_rule(deciding, plane.decision, plane.gap_mode)
        pictures.append(f'<div><h3>{escape(model)}</h3><p class="lead">{escape(rule)}</p>{picture}{key}</div>')
    has_region = any(plane.tau_c is not None and plane.tau_f is not None for _, plane, _ in shown)
    region = " Below and left of both thresholds it goes to SQ." if has_region else ""
    return (
        '<section class="planes"><h2>Proxies and choice</h2><p class="lead">The proxies of a weight are the same under '
        f'every policy.{region}</p><div class="panels">{"".join(pictures)}</div></section>'
    )


def _times(data: FamilyData) -> str:
    bars = time_bars(data)
    if not bars:
        return ""
    return (
        '<section class="times"><h2>Wall time by stage</h2><p class="lead">Stages under “shared” ran once for all '
        "policies of the model. Lengths compare within a model. The time in the table above also holds waiting and "
        f"starting.</p>{bars}</section>"
    )


def _provenance(data: FamilyData) -> str:
    groups = fact_groups(data)
    if not groups:
        return ""
    tables = "".join(
        f"<h3>{escape(group.title)}</h3>{table_markup(Table(('item', 'value'), group.facts, 'll'), 'facts', escape)}"
        for group in groups
    )
    count = sum(len(group.facts) for group in groups)
    return (
        f"<section><details><summary>Provenance<span>{count}</span></summary>"
        '<div class="facts-of"><p class="note">What several cells share is said once.</p>'
        f"{tables}</div></details></section>"
    )


def render(data: FamilyData) -> str:
    """The page. Every text in it is escaped; it opens without a network and holds no time of making."""
    headlines = family_headlines(data)
    cards = "".join(map(card_markup, headlines))
    # three cards a row would leave one alone in the last
    columns = "cards four" if len(headlines) % 3 == 1 and len(headlines) > 1 else "cards"
    sections = (_failures, _size, _models, _maps, _planes, _times, _provenance)
    body = (
        f'<header><p class="kicker">rwkvq family report</p><h1>{escape(data.name)}</h1>'
        f'<p class="lead">{escape(family_sentence(data))}</p></header>'
        f'<section class="{columns}" aria-label="Headline figures">{cards}</section>\n'
        + "\n".join(section(data) for section in sections)
        + "\n"
    )
    return document(f"{data.name}: rwkvq family report", family_style_sheet(), body)
