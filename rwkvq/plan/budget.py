"""Policy `budget`: the bits of a target go where the model needs them, by the curves that stage `curves` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rwkvq.checkpoint.names import Weight
from rwkvq.errors import PlanError
from rwkvq.plan.allocate import Allocation, Option, allocate
from rwkvq.plan.candidates import Candidate, CurvePoint, allowed, by_weight
from rwkvq.plan.groups import launch_groups, merged
from rwkvq.plan.size import file_bits
from rwkvq.settings import FormatSet, LaunchGroups


@dataclass(frozen=True, slots=True)
class Target:
    """What may be spent on the decided weights, bits, and what the user called it.

    size: of the whole weight file, bytes, where that is the target; then entries of its header count too, as those of
    a file of less than `largest` bytes.
    """

    words: str
    bits: int
    size: int | None = None
    largest: int = 0

    def cost(self, name: str, candidate: Candidate) -> int:
        """Bits that a weight in this format takes of the target."""
        return candidate.layout.stored_bits() if self.size is None else file_bits(name, candidate.layout, self.largest)

    def check(self, floor: int, weights: int) -> None:
        """Raise PlanError if the decided weights take at least `floor` bits and that is too much."""
        if floor <= self.bits:
            return
        if self.size is not None:
            smallest = self.size + -(-(floor - self.bits) // 8)
            raise PlanError(
                f"{self.words} cannot be met: the smallest weight file takes {smallest:,} bytes; choose a larger size"
            )
        raise PlanError(
            f"{self.words} cannot be met: at least {floor / weights:.3f} bits a matrix weight are needed, "
            f"{self.bits / weights:.3f} are left; choose a larger target"
        )


@dataclass(frozen=True, slots=True)
class BudgetChoice:
    """The candidate of every decided weight and why, the bits of the target that are spent, and the predicted loss.

    loss_without_groups: of the choice that launch groups do not bind.
    """

    candidates: Mapping[str, Candidate]
    reasons: Mapping[str, str]
    bits: int
    loss: float
    loss_without_groups: float


def choose(
    decided: Sequence[Weight],
    candidates: Mapping[str, Sequence[Candidate]],
    points: Sequence[CurvePoint],
    target: Target,
    formats: FormatSet,
    groups: LaunchGroups = "none",
) -> BudgetChoice:
    """Spend the target on the decided weights, each of which gets one of its `candidates` by name.

    Raises PlanError if the target cannot be met, naming the floor, or the curves are of another model.
    """
    if not decided:
        raise PlanError("policy budget: no weight is left to decide; set plan.lora to quantize or use another policy")
    curves = by_weight(points)
    known = {weight.name: {item.label: item for item in candidates[weight.name]} for weight in decided}
    for weight in decided:
        found = curves.get(weight.name, {})
        if not found or any(
            label not in known[weight.name] or point.stored_bits != known[weight.name][label].layout.stored_bits()
            for label, point in found.items()
        ):
            raise PlanError(f"{weight.name}: the table of curves does not fit this model; run the stage `curves` again")
    options = {
        name: [
            Option(item.label, target.cost(name, item), curves[name][item.label].loss)
            for item in allowed(labels.values(), formats)
            if item.label in curves[name]
        ]
        for name, labels in known.items()
    }
    if empty := next((name for name, choices in options.items() if not choices), None):
        raise PlanError(f"{empty}: no format of plan.formats {formats} fits it; use plan.formats quality")
    numel = sum(_numel(weight) for weight in decided)
    free = _labels(options, [(name,) for name in options], target, numel)
    bound = launch_groups(decided, groups)
    made = free if groups == "none" else _labels(options, bound, target, numel)
    partners = {name: len(group) - 1 for group in bound for name in group}
    chosen = {name: known[name][label] for name, label in made.labels.items()}
    reasons = {name: _reason(choices, made.labels[name], partners[name]) for name, choices in options.items()}
    return BudgetChoice(chosen, reasons, made.bits, made.loss, free.loss)


def _labels(
    options: Mapping[str, Sequence[Option]], groups: Sequence[Sequence[str]], target: Target, numel: int
) -> Allocation:
    """The label of every weight; those of a group have one format and rate. Raises PlanError, naming the floor."""
    shared = {group[0]: merged(options, group) for group in groups}
    items = {
        first: [
            Option(rate, sum(own.bits for own in parts), sum(own.loss for own in parts))
            for rate, parts in choices.items()
        ]
        for first, choices in shared.items()
    }
    target.check(sum(min(option.bits for option in choices) for choices in items.values()), numel)
    made = allocate(items, target.bits)
    labels = {
        name: own.label
        for group in groups
        for name, own in zip(group, shared[group[0]][made.labels[group[0]]], strict=True)
    }
    return Allocation(labels, made.bits, made.loss)


def _numel(weight: Weight) -> int:
    return weight.shape[0] * weight.shape[1]


def _reason(options: Sequence[Option], label: str, partners: int) -> str:
    """Why a weight got its format: its predicted loss, and what a cheaper or dearer one would have changed.

    partners: other weights of its launch group.
    """
    ordered = sorted(options, key=lambda option: option.bits)
    place = [option.label for option in ordered].index(label)
    loss = ordered[place].loss
    said = f"budget: predicted KL {loss:.2e}"
    if place:
        said += f"; {ordered[place - 1].label} would add {ordered[place - 1].loss - loss:.2e}"
    if place + 1 < len(ordered):
        said += f"; {ordered[place + 1].label} would save {loss - ordered[place + 1].loss:.2e}"
    return f"{said}; one format with {partners} others" if partners else said
