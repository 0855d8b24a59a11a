"""What each experiment measures, by its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rwkvq.ablations import analysis, choices, others, row_blocks
from rwkvq.ablations.arms import Arms
from rwkvq.ablations.cases import Case
from rwkvq.ablations.results import ResultRow

CASES: Mapping[str, Callable[[Arms], list[Case]]] = {
    "E1": others.leak_cases,
    "E2": choices.share_cases,
    "E3": choices.threshold_cases,
    "E4": choices.equal_bits_cases,
    "E5": choices.proxy_cases,
    "E6": choices.order_cases,
    "E7": choices.one_proxy_cases,
    "E9": others.elementwise_cases,
    "E10": others.width_cases,
    "E11": others.budget_cases,
    "E12": others.line_cases,
    "E13": others.samples_cases,
    "E14": others.line_cases,
    "E17": row_blocks.row_block_cases,
    "E20": others.recurrence_cases,
}
"""Models to measure. E8 has none of its own: it is made from the rows of E3."""

EXTRA_ROWS: Mapping[str, Callable[[Arms], list[ResultRow]]] = {
    "E5": analysis.correlation_rows,
    "E6": analysis.order_rows,
    "E16": analysis.cost_rows,
    "E18": analysis.proxy_rows,
}
"""Rows without a measurement."""
