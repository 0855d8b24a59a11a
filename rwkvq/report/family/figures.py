"""Which policy is best, said only where the measurement can tell, and the sentences about a family run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rwkvq.report.data import Estimate, QualityRow
from rwkvq.report.family.data import STATES, CellData, FamilyData
from rwkvq.report.headlines import Headline
from rwkvq.report.tables import disjointness_sentences, measured_on
from rwkvq.report.text import bits_text, estimate_text, seconds_text, size_text

SMALLER_IS_BETTER: Mapping[str, bool] = {"kl": True, "perplexity": True, "top1": False, "lambada_accuracy": False}
"""The measures compared, by attribute of QualityRow."""


def is_finite(estimate: Estimate | None) -> bool:
    """True if there is a value to compare."""
    return estimate is not None and math.isfinite(estimate.value)


def estimate_in(row: QualityRow | None, key: str) -> Estimate | None:
    """The estimate in the attribute `key`; None if there is no row or it was not measured."""
    value: Estimate | None = None if row is None else getattr(row, key)
    return value


def are_apart(one: Estimate, other: Estimate) -> bool:
    """True if two values differ by more than both standard errors together; unknown errors tell nothing apart."""
    if one.error is None or other.error is None:
        return False
    return abs(one.value - other.value) > one.error + other.error


def ranked(cells: Sequence[CellData], key: str) -> list[tuple[CellData, Estimate]]:
    """The cells with a finite `key`, best first; equal values keep the order of the run."""
    sign = 1 if SMALLER_IS_BETTER[key] else -1
    found = [(cell, value) for cell in cells if (value := estimate_in(cell.quality, key)) is not None]
    return sorted((pair for pair in found if is_finite(pair[1])), key=lambda pair: sign * pair[1].value)


def clear_best(cells: Sequence[CellData], key: str) -> CellData | None:
    """The best cell of one model if it is apart from every other; None if there is no other or it is too close."""
    order = ranked(cells, key)
    if len(order) < 2 or not all(are_apart(order[0][1], other) for _, other in order[1:]):
        return None
    return order[0][0]


def counted(count: int, word: str) -> str:
    """`1 model`, `3 models`, `2 policies`."""
    plural = f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"
    return f"{count} {word if count == 1 else plural}"


def total_seconds(data: FamilyData) -> float | None:
    """The cells' wall times added up, cells that ran side by side in full; None if no cell has a time."""
    known = [cell.seconds for cell in data.cells if cell.seconds is not None and math.isfinite(cell.seconds)]
    return sum(known) if known else None


def family_sentence(data: FamilyData) -> str:
    """What was run, in one line."""
    return f"{counted(len(data.models), 'model')} · {counted(len(data.policies), 'policy')}"


def _state_card(data: FamilyData) -> Headline:
    counts = [(state, len(data.in_state(state))) for state in STATES]
    shown = tuple((state, str(count)) for state, count in counts if count or state == "done")
    seconds = total_seconds(data)
    return Headline("Cells", shown, "" if seconds is None else f"{seconds_text(seconds)}, all cells added up")


def _best_card(model: str, cells: tuple[CellData, ...]) -> Headline:
    order = ranked(cells, "kl")
    title = f"{model}: lowest KL"
    if not order:
        return Headline(title, (("not measured", "–"),), "")
    (best, kl), others = order[0], [cell.policy for cell, other in order[1:] if not are_apart(order[0][1], other)]
    value, _, error = estimate_text(kl).partition(" ± ")
    words = [f"± {error}"] if error else []
    if best.report is not None:
        sizes = best.report.sizes
        words += [size_text(sizes.file_bytes), f"{bits_text(sizes.matrix_bits)} matrix bits"]
    if others:
        words.append(f"not told apart from {others[0] if len(others) == 1 else f'{len(others)} others'}")
    return Headline(title, ((best.policy, value),), ", ".join(words))


def family_headlines(data: FamilyData) -> list[Headline]:
    """The figures to read first: states and time, then the best policy of every model."""
    return [_state_card(data), *(_best_card(model, data.cells_of(model)) for model in data.models)]


def _names(cells: Sequence[CellData], data: FamilyData) -> str:
    """Short names for a set of cells: whole models where possible."""
    names = []
    for model in data.models:
        found = [cell for cell in cells if cell.model == model]
        is_whole = len(found) == sum(cell.report is not None for cell in data.cells_of(model))
        names += [model] if found and is_whole else [cell.name for cell in found]
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def measured_sentences(data: FamilyData) -> list[tuple[str, bool]]:
    """What the figures were measured on, and True for sentences that warn of leaked text.

    A sentence that holds for all cells is said once; others name the cells they hold for.
    """
    found: dict[tuple[str, bool], list[CellData]] = {}
    for cell in data.cells:
        if cell.report is None:
            continue
        sentences = [(text, False) for text in measured_on(cell.report)]
        proofs = zip(disjointness_sentences(cell.report), cell.report.disjointness, strict=True)
        for sentence in [*sentences, *((text, proof.shared > 0) for text, proof in proofs)]:
            found.setdefault(sentence, []).append(cell)
    everything = sum(cell.report is not None for cell in data.cells)
    return [
        (text if len(cells) == everything else f"{_names(cells, data)}: {text}", is_warning)
        for (text, is_warning), cells in found.items()
    ]


def reason_of(cell: CellData) -> str:
    """Why a cell has no result, on one line."""
    return " ".join((cell.error or "no reason is known").split())


def kept_sentence(cell: CellData) -> str:
    """What of a failed cell's work is kept."""
    return f"Kept: {', '.join(cell.kept) or 'all that its finished stages wrote'}."


RERUN = "The same command again does only what is missing: finished cells and stages are kept."
"""How a failed family run is finished."""
