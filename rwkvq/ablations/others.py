"""Cases of the experiments that compare lines, widths, element-wise formats and texts: E1, E9 to E14, E20."""

from __future__ import annotations

import random

from rwkvq.ablations import lines
from rwkvq.ablations.arms import Arms, lowest
from rwkvq.ablations.cases import Case, line_case
from rwkvq.ablations.mix import FLOAT, Subject
from rwkvq.plan.allocate import Option, allocate
from rwkvq.plan.tensor import PlannedTensor

DRAWS = 3


def leak_cases(arms: Arms) -> list[Case]:
    """E1: last words under three calibration texts, and those of the float model."""
    return [line_case(line, "lambada") for line in (FLOAT, *lines.LEAKS)]


def elementwise_cases(arms: Arms) -> list[Case]:
    """E9: element-wise weights of every line, the other weights from arm VQ, and the other weights float."""
    names = [row.name for row in arms.artifacts["vq"].plan.tensors if row.weight_class == "elementwise"]
    found = []
    for base in (FLOAT, "vq"):
        for line in (*lines.ELEMENTWISE, "vq"):
            if base == FLOAT and line == "vq":  # 16 bits in both: nothing to measure
                continue
            kind = "fp16" if line == "vq" else line.removeprefix("elementwise-")
            subject = Subject(base, {name: (line,) for name in names})
            found.append(Case(f"{kind}, matrices {base}", {"elementwise": kind, "matrices": base}, subject))
    return found


def width_cases(arms: Arms) -> list[Case]:
    """E10: both arms at 2, 3 and 4 bits, and mixes of the widths of one arm at the size of its 3 bits."""
    found = [line_case(lines.width_line(arm, bits), arm=arm, bits=bits) for arm in lines.ARMS for bits in lines.WIDTHS]
    for arm in lines.ARMS:
        found.append(_allocated(arms, arm))
        for draw in range(DRAWS):
            found.append(_at_random(arms, arm, draw))
    return found


def _allocated(arms: Arms, arm: str) -> Case:
    """Widths that make the sum of relative output errors, each weighted by the size of its matrix, the least."""
    rows = {bits: _rows(arms, lines.width_line(arm, bits)) for bits in lines.WIDTHS}
    options = {
        name: [
            Option(line, rows[bits][name].stored_bits, size * arms.error(line, name, "output_error"))
            for bits in lines.WIDTHS
            for line in [lines.width_line(arm, bits)]
        ]
        for name, size in arms.sizes.items()
    }
    budget = sum(rows[3][name].stored_bits for name in arms.sizes)
    labels = allocate(options, budget).labels
    subject = Subject(lines.width_line(arm, 3), {name: (line,) for name, line in labels.items()})
    return Case(f"{arm}, mixed by error", {"arm": arm, "bits": "by error"}, subject)


def _at_random(arms: Arms, arm: str, draw: int) -> Case:
    """A third of the weights at 2 bits, a third at 4 bits, by chance."""
    chooser = random.Random(f"E10 {arms.seed} {draw}")
    names = sorted(arms.sizes)
    chooser.shuffle(names)
    scores = {name: float(place) for place, name in enumerate(names)}
    third, two_thirds = (lowest(scores, arms.sizes, share) for share in (1 / 3, 2 / 3))
    low, _, high = (lines.width_line(arm, bits) for bits in lines.WIDTHS)
    choice = {name: (low if name in third else high,) for name in two_thirds}
    subject = Subject(lines.width_line(arm, 3), choice)
    return Case(f"{arm}, mixed at random {draw}", {"arm": arm, "bits": "at random", "draw": draw}, subject)


def _rows(arms: Arms, line: str) -> dict[str, PlannedTensor]:
    return {row.name: row for row in arms.artifacts[line].plan.tensors}


def budget_cases(arms: Arms) -> list[Case]:
    """E11: policy budget at every target, and both arms at every width."""
    found = [line_case(lines.budget_line(bpw), method="budget", target=bpw) for bpw in lines.BUDGETS]
    return found + [
        line_case(lines.width_line(arm, bits), method=arm, target=bits) for arm in lines.ARMS for bits in lines.WIDTHS
    ]


def line_cases(arms: Arms) -> list[Case]:
    """E12, E14: every line of the experiment as it is."""
    return [line_case(line) for line in arms.runs]


def samples_cases(arms: Arms) -> list[Case]:
    """E13: numbers of calibration windows, measured on other text, on these windows and on last words."""
    found = []
    for count in lines.SAMPLES:
        line = lines.samples_line(count)
        found += [line_case(line, text, samples=count) for text in ("text", "calibration", "lambada")]
    return [*found, line_case(FLOAT, "lambada")]


def recurrence_cases(arms: Arms) -> list[Case]:
    """E20: both arms in long windows; arm VQ with LoRA factors in 16, 8 and 3 bits; LoRA factors alone quantized."""
    loras = [name for name, row in arms.decided.items() if row.weight_class == "lora"]
    found = [line_case(line, "long") for line in lines.ARMS]
    for kind, line in {"fp16": "lora-fp16", "int8": "lora-int8", "quantized": "vq"}.items():
        subject = Subject("vq", {name: (line,) for name in loras})
        found.append(Case(f"LoRA {kind}, matrices vq", {"lora": kind, "matrices": "vq"}, subject))
        if kind != "fp16":
            alone = Subject(FLOAT, {name: (line,) for name in loras})
            found.append(Case(f"LoRA {kind}, matrices float", {"lora": kind, "matrices": "float"}, alone))
    # which factors: by the path that they belong to
    for path in sorted({path_of(name) for name in loras}):
        some = Subject(FLOAT, {name: ("vq",) for name in loras if path_of(name) == path})
        found.append(Case(f"LoRA of {path} alone", {"lora": path, "matrices": "float"}, some))
    return found


def path_of(name: str) -> str:
    """What a LoRA factor serves: `w`, `a`, `v`, `g` of x070; `maa`, `decay` of x060."""
    short = name.split(".att.")[1]
    return short.removeprefix("time_").split("_")[0] if short.startswith("time_") else short[0]
