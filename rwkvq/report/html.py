"""The report as one self-contained HTML page: no script, nothing loaded, equal input giving equal bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby

from rwkvq.report.data import ReportData, TensorRow
from rwkvq.report.headlines import Headline, headlines
from rwkvq.report.plots import MAX_BLOCKS_SIDE_BY_SIDE, heat_map, is_mixed, part_bar, plane_key, proxy_plane, stage_bars
from rwkvq.report.style import style_sheet
from rwkvq.report.tables import (
    Table,
    bits_table,
    budget_sentences,
    disjointness_sentences,
    distillation_sentences,
    flatten,
    measured_on,
    model_sentence,
    parts,
    parts_table,
    quality_table,
    stage_table,
    tensor_table,
)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy: even markup that slipped through could load and run nothing."""


def cell_markup(text: str) -> str:
    """Escaped text; a standard error is set apart so that it can be smaller."""
    value, sign, error = escape(text).partition(" ± ")
    return f'{value}<span class="se">± {error}</span>' if sign else value


def _kind(table: Table, at: int) -> str:
    names = [name for name, holds in (("r", table.align[at] == "r"), ("strong", at in table.strong)) if holds]
    return f' class="{" ".join(names)}"' if names else ""


def _row(table: Table, row: Sequence[str], cell: Callable[[str], str], before: str = "") -> str:
    """A table row whose first cell heads it; `before` is markup in front of that cell's text."""
    first = f'<tr><th scope="row">{before}{cell(row[0])}'
    return first + "".join(f"<td{_kind(table, at)}>{cell(text)}" for at, text in enumerate(row) if at)


def head_markup(table: Table) -> str:
    """The header row of a table."""
    cells = (f'<th scope="col"{_kind(table, at)}>{escape(name)}' for at, name in enumerate(table.columns))
    return f"<thead><tr>{''.join(cells)}</thead>"


def table_markup(table: Table, kind: str = "", cell: Callable[[str], str] = cell_markup) -> str:
    """A table that scrolls inside itself when the page is too narrow."""
    body = "".join(_row(table, row, cell) for row in table.rows)
    return f'<div class="scroll"><table class="rows {kind}">{head_markup(table)}<tbody>{body}</tbody></table></div>'


def card_markup(card: Headline) -> str:
    """One headline: its title, its labelled figures, its remark."""
    figures = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in card.figures)
    # three figures are three ways to count the same thing, so none of them is the reference of another
    kind = ' class="all"' if len(card.figures) > 2 else ""
    return f'<div class="card"><h2>{escape(card.title)}</h2><dl{kind}>{figures}</dl><p>{escape(card.remark)}</p></div>'


def notes_markup(sentences: Sequence[str]) -> str:
    """Small print, one paragraph a sentence."""
    return "".join(f'<p class="note">{escape(sentence)}</p>' for sentence in sentences)


def _quality(report: ReportData) -> str:
    if not report.quality:
        return ""
    proofs = "".join(
        f'<p class="note{"" if proof.shared == 0 else " warn"}">{escape(sentence)}</p>'
        for proof, sentence in zip(report.disjointness, disjointness_sentences(report), strict=True)
    )
    table = table_markup(quality_table(report), "quality")
    return f"<section><h2>Quality</h2>{table}{notes_markup(measured_on(report))}{proofs}</section>"


def _bits(report: ReportData) -> str:
    counted = bits_table(report)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}<td class="r">{escape(bits)}<td class="what">{escape(what)}'
        for name, bits, what in counted.rows
    )
    honest = f'<table class="rows counted">{head_markup(counted)}<tbody>{rows}</tbody></table>'
    shares = parts(report)
    table = parts_table(report)
    body = "".join(
        _row(table, row, cell_markup, f'<i class="swatch part-{part.key}"></i>')
        for part, row in zip(shares, table.rows, strict=True)
    )
    where = f'<div class="scroll"><table class="rows parts">{head_markup(table)}<tbody>{body}</tbody></table></div>'
    return (
        f"<section><h2>Honest bits per weight</h2>{honest}</section>"
        f"<section><h2>Where the bytes are</h2>{part_bar(shares)}{where}</section>"
    )


def _budget(report: ReportData) -> str:
    return _section("Budget", budget_sentences(report))


def _distillation(report: ReportData) -> str:
    return _section("Distillation", distillation_sentences(report))


def _section(title: str, sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    lead, notes = escape(sentences[0]), notes_markup(sentences[1:])
    return f'<section><h2>{title}</h2><p class="lead">{lead}</p>{notes}</section>'


def _plane(report: ReportData) -> str:
    plane = report.proxies
    if report.budget is not None or plane is None or not plane.rows:
        return ""
    rule = f"Decision: {plane.decision}. Gap mode {plane.gap_mode}."
    region = (
        "" if plane.tau_c is None or plane.tau_f is None else " Below and left of both thresholds a weight goes to SQ."
    )
    return (
        f'<section><h2>Proxies and choice</h2><p class="lead">{escape(rule)}{region}</p>'
        f"{proxy_plane(plane)}{plane_key(plane)}</section>"
    )


def _maps(report: ReportData) -> str:
    if not any(row.block is not None and row.method != "keep" for row in report.tensors):
        return ""
    blocks = {row.block for row in report.tensors if row.block is not None}
    layout = "two" if len(blocks) <= MAX_BLOCKS_SIDE_BY_SIDE else "two deep"
    edges = " An orange edge marks scalar formats." if is_mixed(report.tensors) else ""
    return (
        f'<section class="{layout}"><div><h2>Bits by block and tensor</h2>'
        f'<p class="lead">Stored bits per weight.{edges}</p>{heat_map(report, "bits")}</div>'
        "<div><h2>Error by block and tensor</h2>"
        '<p class="lead">Output error on calibration inputs, % of the output\'s energy.</p>'
        f"{heat_map(report, 'error')}</div></section>"
    )


def _times(report: ReportData) -> str:
    if not report.stages:
        return ""
    total = stage_table(report).rows[-1][1]
    bars = stage_bars(report.stages)
    return f'<section><h2>Wall time by stage</h2><p class="lead">{escape(total)} in all.</p>{bars}</section>'


def _tensors(rows: Sequence[TensorRow]) -> str:
    """All weights, grouped by block; reasons that repeat inside a block are still written out, a row stands alone."""
    table = tensor_table(rows)
    cells = iter(table.rows)
    bodies = []
    for block, group in groupby(rows, key=lambda row: row.block):
        name = "outside the blocks" if block is None else f"block {block}"
        lines = "".join(_row(table, next(cells), escape) for _ in group)
        bodies.append(f'<tbody><tr class="group"><th colspan="{len(table.columns)}">{name}{lines}</tbody>')
    return f'<div class="scroll"><table class="rows long">{head_markup(table)}{"".join(bodies)}</table></div>'


def _appendix(report: ReportData) -> str:
    facts = flatten(report.provenance)
    provenance = Table(("item", "value"), tuple(facts), "ll")
    return (
        f"<section><details><summary>Every tensor<span>{len(report.tensors)}</span></summary><div>"
        '<p class="note">Error: tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), H the second moment of the calibration inputs.</p>'
        f"{_tensors(report.tensors)}</div></details>"
        f"<details><summary>Provenance<span>{len(facts)}</span></summary><div>"
        f"{table_markup(provenance, 'facts', escape)}</div></details></section>"
    )


def document(title: str, style: str, body: str) -> str:
    """A whole page that opens without a network; `title` is text, `style` and `body` are markup."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>\n'
        f"<style>{style}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def render(report: ReportData) -> str:
    """The page. Every text in it is escaped; it opens without a network and holds no time of making."""
    cards = "".join(map(card_markup, headlines(report)))
    sections = (_quality, _bits, _budget, _distillation, _plane, _maps, _times, _appendix)
    body = (
        f'<header><p class="kicker">rwkvq report</p><h1>{escape(report.model)}</h1>'
        f'<p class="lead">{escape(model_sentence(report))}</p></header>'
        f'<section class="cards" aria-label="Headline figures">{cards}</section>\n'
        + "\n".join(section(report) for section in sections)
        + "\n"
    )
    return document(f"{report.model}: rwkvq report", style_sheet(), body)
