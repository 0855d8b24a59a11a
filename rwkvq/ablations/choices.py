"""Cases that choose between the arms SQ and VQ for every weight: E2 to E7."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from itertools import product

from rwkvq.ablations.arms import Arms, choice_of, lowest, sq_of
from rwkvq.ablations.cases import Case, Value
from rwkvq.ablations.mix import Subject
from rwkvq.checkpoint.names import extract, weights_of
from rwkvq.plan import decide
from rwkvq.proxies.fine import fine
from rwkvq.proxies.gaps import GAP_MODES, gaps_of, spectrum
from rwkvq.proxies.table import GapMeasures
from rwkvq.settings import GapMode, ShareBy

MODE: GapMode = "quantile"
"""Gap mode of preset `rwkvq`, where an experiment does not vary it."""
STEPS = tuple(round(0.1 * step, 1) for step in range(11))
TAU_C = (1.54, 1.7, 1.85, 2.0, 2.25, 2.5)
TAU_F = (30.0, 50.0, 100.0, 300.0, 1000.0)
"""Thresholds in gap mode `unique`, for which the published ones were made (arXiv 2505.03803 4.1: 1.54 and 30)."""
COARSE = (0.25, 0.5, 0.75, 1.0)
FINE = (0.2, 0.5, 0.8, 1.0)
"""C and F, with the published 0.5 and 0.2 among them."""
SHARES = (0.1, 0.5, 0.9)
DRAWS = 5
ORDERS = (2, 3, 4, 5, 6)
OTHERS = ("variance", "cv", "range", "mad")
"""Measures of arXiv 2505.03803 Table 6, fields of GapMeasures."""


def mixed(arms: Arms, label: str, sq: Iterable[str], **parameters: Value) -> Case:
    """The case in which the weights `sq` are scalar."""
    return Case(label, parameters, Subject("vq", choice_of(arms, sq)))


def share_cases(arms: Arms) -> list[Case]:
    """E2: shares of SQ from 0 to 1, by count and by weights, in the order of the two proxies."""
    candidates = arms.candidates(MODE)
    found = []
    by: ShareBy
    for by in ("count", "weights"):
        for target in STEPS:
            verdict = decide.share(candidates, target=target, by=by)
            found.append(mixed(arms, f"{target:.0%} by {by}", sq_of(verdict), share=target, by=by))
    return found


def threshold_cases(arms: Arms) -> list[Case]:
    """E3: tau_c x tau_f in gap mode `unique`, C x F in gap mode `quantile`."""
    unique, quantile = arms.candidates("unique"), arms.candidates(MODE)
    found = []
    for tau_c, tau_f in product(TAU_C, TAU_F):
        verdict = decide.fixed(unique, tau_c=tau_c, tau_f=tau_f)
        label = f"tau {tau_c:g} / {tau_f:g}"
        found.append(mixed(arms, label, sq_of(verdict), rule="fixed", first=tau_c, second=tau_f))
    for coarse, second in product(COARSE, FINE):
        verdict = decide.percentile(quantile, coarse=coarse, fine=second)
        label = f"C {coarse:g}, F {second:g}"
        found.append(mixed(arms, label, sq_of(verdict), rule="percentile", first=coarse, second=second))
    return found


def equal_bits_cases(arms: Arms) -> list[Case]:
    """E4: SQ with symmetric grids (3.25 bits), VQ (3.254 bits), and mixes of these two."""
    lines = ("sq-symmetric", "vq")
    candidates = arms.candidates(MODE)
    found = [Case(line, {"choice": line}, Subject(line)) for line in lines]
    for target in SHARES:
        chosen = sq_of(decide.share(candidates, target=target, by="weights"))
        label = f"proxies, {target:.0%} SQ"
        found.append(Case(label, {"choice": "proxies", "share": target}, Subject("vq", choice_of(arms, chosen, lines))))
    better = [name for name in arms.decided if arms.ratio(name, "output_error", *lines) < 0]
    found.append(Case("smaller output error", {"choice": "error"}, Subject("vq", choice_of(arms, better, lines))))
    return found


def proxy_cases(arms: Arms) -> list[Case]:
    """E5: which weights are scalar at equal shares by weights, by the proxies, by chance, by other measures."""
    found = []
    for target in SHARES:
        for name, scores in orders(arms).items():
            label = f"{name}, {target:.0%} SQ"
            found.append(mixed(arms, label, lowest(scores, arms.sizes, target), order=name, share=target))
    for name in ("mse", "hessian"):
        scores = orders(arms)[name]
        better = [weight for weight, score in scores.items() if score < 0]
        found.append(mixed(arms, f"{name}, the smaller", better, order=name, share="free"))
    return found


def orders(arms: Arms) -> dict[str, dict[str, float]]:
    """Scores by weight in every order of E5: the lowest become scalar first.

    mse, hessian: logarithm of the measured error of SQ over that of VQ, of weights and of outputs.
    """
    found: dict[str, dict[str, float]] = {}
    for mode in GAP_MODES:
        found[f"proxies, {mode}"] = ranks(arms, mode)
    found["proxies, reversed"] = {name: -score for name, score in ranks(arms, MODE).items()}
    for draw in range(DRAWS):
        chooser = random.Random(f"E5 {arms.seed} {draw}")
        found[f"random {draw}"] = {name: chooser.random() for name in arms.decided}
    found["mse"] = {name: arms.ratio(name, "weight_error") for name in arms.decided}
    found["hessian"] = {name: arms.ratio(name, "output_error") for name in arms.decided}
    found["maxrms"] = {name: arms.proxies[name].measures.max_over_rms for name in arms.decided}
    for measure in OTHERS:
        found[measure] = gap_scores(arms, MODE, measure)
    return found


def gap_scores(arms: Arms, mode: GapMode, measure: str) -> dict[str, float]:
    """One measure of the gaps (a field of GapMeasures) by weight."""
    assert measure in GapMeasures.__dataclass_fields__, measure
    return {name: float(getattr(arms.proxies[name].measures.of_mode(mode), measure)) for name in arms.decided}


def ranks(arms: Arms, mode: GapMode, p_f: Mapping[str, float] | None = None) -> dict[str, float]:
    """The larger of both ranks by weight, as rule `share` orders them; p_f: another P_f by name."""
    by_c = _ranks(gap_scores(arms, mode, "p_c"))
    by_f = _ranks(p_f or gap_scores(arms, mode, "p_f"))
    return {name: float(max(by_c[name], by_f[name])) for name in by_c}


def _ranks(scores: Mapping[str, float]) -> dict[str, int]:
    ordered = sorted(scores, key=lambda name: (scores[name], name))
    return {name: rank for rank, name in enumerate(ordered, 1)}


def order_cases(arms: Arms) -> list[Case]:
    """E6: P_f up to the K-th moment, with and without the sign (-1)^k, half of the weights scalar."""
    found = []
    for (order, signed), values in fine_orders(arms).items():
        chosen = lowest(ranks(arms, MODE, values), arms.sizes, 0.5)
        found.append(
            mixed(arms, f"K {order}, {'signed' if signed else 'absolute'}", chosen, order=order, signed=signed)
        )
    return found


def fine_orders(arms: Arms) -> dict[tuple[int, bool], dict[str, float]]:
    """P_f in gap mode `quantile` by weight, for every K and both ways to treat the sign."""
    source = arms.checkpoint
    weights = weights_of(source.spec, {name: source.shape(name) for name in source.names()})
    quantiles = arms.runs["sq"].settings.proxies.quantiles
    found: dict[tuple[int, bool], dict[str, float]] = {(k, signed): {} for k, signed in product(ORDERS, (False, True))}
    for weight in weights:
        if weight.name in arms.decided:
            gaps = gaps_of(spectrum(extract(source.tensor(weight.tensor), weight)), MODE, quantiles=quantiles)
            for (order, signed), values in found.items():
                values[weight.name] = fine(gaps, order=order, signed=signed)
    return found


def one_proxy_cases(arms: Arms) -> list[Case]:
    """E7: both proxies, P_c alone and P_f alone at equal shares by count, in two gap modes; P_c with a smaller tau."""
    found = []
    modes: tuple[GapMode, ...] = ("quantile", "unique")
    for mode, (target, both) in product(modes, ((0.1, (0.5, 0.2)), (0.5, (0.7, 5 / 7)))):
        candidates = arms.candidates(mode)
        for name, (coarse, second) in {"both": both, "P_c": (target, 1.0), "P_f": (1.0, target)}.items():
            verdict = decide.percentile(candidates, coarse=coarse, fine=second)
            label = f"{name}, {mode}, {target:.0%}"
            found.append(mixed(arms, label, sq_of(verdict), proxies=name, mode=mode, share=target))
    unique = arms.candidates("unique")
    for tau_c in (1.4, *TAU_C):
        verdict = decide.fixed(unique, tau_c=tau_c, tau_f=float("inf"))
        found.append(mixed(arms, f"tau_c {tau_c:g} alone", sq_of(verdict), proxies="P_c", mode="unique", tau_c=tau_c))
    return found
