"""The experiments: what each asks, which lines it needs, which models it measures, and whether a seed matters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rwkvq.ablations import lines


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment of docs/method.md 13.

    lines: ordinary runs of every model and seed, none if it measures nothing itself; every_seed: run for each seed of
    the study, not for the first alone; uses: experiments whose rows its figures are made from.
    """

    key: str
    title: str
    question: str
    lines: tuple[str, ...]
    every_seed: bool = True
    uses: tuple[str, ...] = ()


_WIDTH_LINES = tuple(lines.width_line(arm, bits) for arm in lines.ARMS for bits in lines.WIDTHS)
_BUDGET_LINES = tuple(lines.budget_line(bpw) for bpw in lines.BUDGETS)
_PRESET_LINES = tuple(f"preset-{preset}" for preset in lines.PRESETS)
_MAIN = ("rtn", *lines.ARMS, *_PRESET_LINES, "budget-3.275")

_ALL = (
    Experiment(
        "E1",
        "Leakage",
        "Does calibration on evaluated LAMBADA lines flatter their figure?",
        lines.LEAKS,
    ),
    Experiment("E2", "Share of SQ", "Which share of scalar quantization is best, by count and by weights?", lines.ARMS),
    Experiment("E3", "Thresholds", "How wide is the plateau of tau_c x tau_f and of C x F?", lines.ARMS),
    Experiment(
        "E4",
        "Hybrid at equal bits",
        "Is a mix better than either arm at the same stored bits?",
        (*lines.ARMS, "sq-symmetric"),
    ),
    Experiment(
        "E5", "Does the proxy choose well?", "Proxy against chance and other measures at equal share.", lines.ARMS
    ),
    Experiment("E6", "Order and sign of P_f", "Do K = 2 ... 6 and the sign (-1)^k matter?", lines.ARMS),
    Experiment("E7", "Is P_f needed?", "Both proxies against P_c alone at equal share.", lines.ARMS),
    Experiment(
        "E8",
        "Thresholds without tuning",
        "What does a setting chosen on the other models lose against the best one of a model?",
        (),
        uses=("E3",),
    ),
    Experiment(
        "E9",
        "Element-wise codebooks",
        "Which weights and formats of the element-wise vectors matter?",
        ("vq", *lines.ELEMENTWISE),
    ),
    Experiment(
        "E10", "Other widths", "2, 3 and 4 bits in both arms, and mixed widths.", _WIDTH_LINES, every_seed=False
    ),
    Experiment(
        "E11",
        "Budgets",
        "Quality against stored bits.",
        (*_WIDTH_LINES, *_BUDGET_LINES),
        every_seed=False,
    ),
    Experiment(
        "E12", "Baselines", "Every method that the settings offer.", (*_MAIN, *lines.BASELINES), every_seed=False
    ),
    Experiment(
        "E13",
        "Overfitting to the calibration windows",
        "How much does the number of calibration windows matter, and how far are they from other text?",
        tuple(lines.samples_line(count) for count in lines.SAMPLES),
    ),
    Experiment("E14", "Variance", "Mean, range and confidence interval of the main methods over seeds.", _MAIN),
    Experiment("E16", "Cost", "Seconds of every stage.", _MAIN, every_seed=False),
    Experiment("E17", "Granularity", "Does a choice by block of 64 rows gain over one a matrix?", lines.ARMS),
    Experiment("E18", "Architectures", "Do the proxies separate versions of RWKV?", ("sq",), every_seed=False),
    Experiment(
        "E20",
        "Recurrence and LoRA",
        "Does the divergence grow along the sequence, and what do quantized LoRA factors cost?",
        (*lines.ARMS, "lora-int8", "lora-fp16"),
    ),
)

EXPERIMENTS: Mapping[str, Experiment] = {experiment.key: experiment for experiment in _ALL}
"""By key. E15 (speed of kernels) and E19 (activation quantization) are not among them."""


def with_used(keys: Iterable[str]) -> set[str]:
    """The keys and those of the experiments that these are made from; unknown keys are kept."""
    keys = set(keys)
    return keys | {used for key in keys if key in EXPERIMENTS for used in EXPERIMENTS[key].uses}
