"""Statistics of rows: rank correlation, confidence intervals, choices that are transferred from model to model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from types import ModuleType

import numpy as np

from rwkvq.ablations.results import ResultRow
from rwkvq.errors import RwkvqError

CONFIDENCE = 0.95
RESAMPLES = 2000


def _scipy_stats() -> ModuleType:
    try:
        from scipy import stats
    except ImportError as error:
        raise RwkvqError("ablations need the extra `ablations`; pip install 'rwkvq[ablations]'") from error
    found: ModuleType = stats
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, in -1 .. 1; 0 where one of them does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    return float(_scipy_stats().spearmanr(x, y).statistic)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float]) -> Interval:
    """Mean of values and the bootstrap interval (percentiles, CONFIDENCE) of it, seeded; a single value has none."""
    data = np.asarray(values, np.float64)
    if len(data) < 2 or float(data.std()) == 0.0:
        return Interval(float(data.mean()), float(data.mean()), float(data.mean()))
    made = _scipy_stats().bootstrap(
        (data,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = made.confidence_interval
    return Interval(float(data.mean()), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Spread:
    """KL of one setting over seeds, and the intervals of its mean over windows (all seeds) and of its difference."""

    setting: str
    values: tuple[float, ...]
    interval: Interval
    difference: Interval | None


def spreads(rows: Sequence[ResultRow], reference: str) -> list[Spread]:
    """Every setting of one experiment and model; difference: from `reference`, paired by window and seed."""
    windows = {(row.setting, row.seed): row.window_kl for row in rows if row.kl is not None}
    found = []
    for setting in dict.fromkeys(row.setting for row in rows if row.kl is not None):
        seeds = [seed for name, seed in windows if name == setting]
        own = window_means([windows[setting, seed] for seed in seeds])
        common = [seed for seed in seeds if (reference, seed) in windows]
        difference = None
        if setting != reference and common:
            pairs = [np.subtract(windows[setting, seed], windows[reference, seed]) for seed in common]
            difference = bootstrap(window_means([tuple(pair.tolist()) for pair in pairs]))
        values = tuple(mean(windows[setting, seed]) for seed in seeds)
        found.append(Spread(setting, values, bootstrap(own), difference))
    return found


def window_means(by_seed: Sequence[Sequence[float]]) -> list[float]:
    """Mean over seeds of every window or word: the text is what is resampled, seeds are too few."""
    return [float(value) for value in np.mean(np.asarray(by_seed, np.float64), axis=0)]


def leak_gain(by_seed: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Interval:
    """E1: what calibration on a word's own passage gains, in nats a word, against calibration on the other half.

    by_seed: logarithms of the probabilities of all words under calibration on the first half, and on the second.
    """
    gains = []
    for first, second in by_seed:
        difference, half = np.subtract(first, second), len(first) // 2
        gains.append(tuple(np.concatenate([difference[:half], -difference[half:]]).tolist()))
    return bootstrap(window_means(gains))


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a model gets from the setting that is best on the mean of the other models, against its own best one."""

    model: str
    chosen: str
    kl: float
    best: str
    best_kl: float

    @property
    def loss(self) -> float:
        """KL of the transferred setting over that of the best one, less 1."""
        return self.kl / self.best_kl - 1


def transfers(rows: Sequence[ResultRow]) -> list[Transfer]:
    """E8 from the rows of a grid of settings: one for each model, none for a single model. KL is a mean over seeds."""
    table = mean_kl(rows)
    settings = [setting for setting in dict.fromkeys(row.setting for row in rows) if _is_complete(table, setting)]
    found = []
    for model, own in table.items():
        others = [values for name, values in table.items() if name != model]
        if not others or not settings:
            continue
        scores = {
            setting: mean(math.log(values[setting] / min(values.values())) for values in others) for setting in settings
        }
        chosen, best = min(scores, key=lambda key: scores[key]), min(settings, key=lambda key: own[key])
        found.append(Transfer(model, chosen, own[chosen], best, own[best]))
    return found


def _is_complete(table: Mapping[str, Mapping[str, float]], setting: str) -> bool:
    return all(setting in values for values in table.values())


def mean_kl(rows: Sequence[ResultRow]) -> dict[str, dict[str, float]]:
    """Mean KL over seeds by model and setting."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.kl is not None:
            found.setdefault(row.model, {}).setdefault(row.setting, []).append(row.kl)
    return {model: {name: mean(values) for name, values in by.items()} for model, by in found.items()}
