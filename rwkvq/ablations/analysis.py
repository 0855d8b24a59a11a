"""Rows that need no measurement: rank correlations (E5, E6), seconds (E16), distributions of the proxies (E18)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from rwkvq.ablations.arms import Arms, ErrorKind
from rwkvq.ablations.choices import MODE, OTHERS, fine_orders, gap_scores
from rwkvq.ablations.results import ResultRow
from rwkvq.ablations.statistics import spearman
from rwkvq.plan.bits import totals
from rwkvq.proxies.gaps import GAP_MODES
from rwkvq.stages import read_seconds

ERRORS: tuple[ErrorKind, ...] = ("weight_error", "output_error")
TAU_C, TAU_F = 1.5, 50.0
"""Thresholds of arXiv 2505.03803 Figure 5, in gap mode `unique`."""


def correlation_rows(arms: Arms) -> list[ResultRow]:
    """E5: rank correlation of each measure with the ratio of the errors of SQ and VQ, over all decided weights.

    Positive where a large measure goes with VQ being better, as the method supposes.
    """
    measures: dict[str, Mapping[str, float]] = {
        f"{measure} {mode}": gap_scores(arms, mode, measure) for mode in GAP_MODES for measure in ("p_c", "p_f")
    }
    measures |= {measure: gap_scores(arms, MODE, measure) for measure in OTHERS}
    measures["maxrms"] = {name: arms.proxies[name].measures.max_over_rms for name in arms.decided}
    return [_correlation(arms, "E5", name, scores, {"measure": name}) for name, scores in measures.items()]


def order_rows(arms: Arms) -> list[ResultRow]:
    """E6: the same of P_f for every K and both ways to treat the sign."""
    return [
        _correlation(
            arms,
            "E6",
            f"P_f K {order}, {'signed' if signed else 'absolute'}",
            values,
            {"order": order, "signed": signed},
        )
        for (order, signed), values in fine_orders(arms).items()
    ]


def _correlation(
    arms: Arms, experiment: str, name: str, scores: Mapping[str, float], parameters: Mapping[str, str | int | bool]
) -> ResultRow:
    names = list(arms.decided)
    values = [scores[weight] for weight in names]
    figures = {
        kind.removesuffix("_error"): spearman(values, [arms.ratio(weight, kind) for weight in names]) for kind in ERRORS
    }
    return ResultRow(experiment, arms.model, arms.seed, f"correlation: {name}", dict(parameters), figures=figures)


def cost_rows(arms: Arms) -> list[ResultRow]:
    """E16: wall seconds of every stage of every line when it last ran, and weights of its matrices."""
    rows = []
    for line, run in arms.runs.items():
        figures = dict(read_seconds(run))
        figures["matrix_weights"] = float(totals(arms.artifacts[line].plan).matrix_weights)
        rows.append(ResultRow("E16", arms.model, arms.seed, line, {"line": line}, figures=figures))
    return rows


def proxy_rows(arms: Arms) -> list[ResultRow]:
    """E18: quantiles of both proxies in every gap mode, by class, and the share that published thresholds pass."""
    classes = {"all": list(arms.decided)}
    for name, row in arms.decided.items():
        classes.setdefault(row.weight_class, []).append(name)
    rows = []
    for mode in GAP_MODES:
        p_c, p_f = gap_scores(arms, mode, "p_c"), gap_scores(arms, mode, "p_f")
        for kind, names in classes.items():
            figures = {"weights": float(len(names))}
            for label, scores in (("p_c", p_c), ("p_f", p_f)):
                figures |= {f"{label}_{q}": value for q, value in _quartiles([scores[name] for name in names]).items()}
            passing = [name for name in names if p_c[name] < TAU_C and p_f[name] < TAU_F]
            figures["passing"] = len(passing) / len(names)
            setting = f"{kind}, {mode}"
            rows.append(
                ResultRow("E18", arms.model, arms.seed, setting, {"class": kind, "mode": mode}, figures=figures)
            )
    return rows


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    """Least, quartiles and largest of finite values; of a single value, that value five times."""
    finite = [value for value in values if math.isfinite(value)]
    cuts = statistics.quantiles(finite, n=4, method="inclusive") if len(finite) > 1 else finite * 3
    return dict(zip(("min", "q1", "median", "q3", "max"), (min(finite), *cuts, max(finite)), strict=True))
