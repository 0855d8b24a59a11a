"""Hashes, settings and versions of a family run without repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rwkvq.report.family.data import FamilyData
from rwkvq.report.tables import flatten

Facts = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class FactGroup:
    """Facts that hold for what `title` names."""

    title: str
    facts: Facts


def _common(groups: Sequence[Facts]) -> Facts:
    """The facts that all groups share, in the order of the first."""
    shared = set(groups[0]).intersection(*groups[1:]) if groups else set()
    return tuple(fact for fact in groups[0] if fact in shared) if groups else ()


def _without(facts: Facts, said: Facts) -> Facts:
    known = set(said)
    return tuple(fact for fact in facts if fact not in known)


def fact_groups(data: FamilyData) -> list[FactGroup]:
    """The run, what all its cells share, what the cells of one model share, and the rest of every cell."""
    by_model: dict[str, list[tuple[str, Facts]]] = {}
    for cell in data.cells:
        if cell.report is not None:
            by_model.setdefault(cell.model, []).append((cell.name, tuple(flatten(cell.report.provenance))))
    everywhere = _common([facts for cells in by_model.values() for _, facts in cells])
    groups = [FactGroup("this run", tuple(flatten(data.provenance))), FactGroup("all cells", everywhere)]
    for model, cells in by_model.items():
        of_model = _common([facts for _, facts in cells])
        groups.append(FactGroup(model, _without(of_model, everywhere)))
        groups += [FactGroup(name, _without(facts, of_model)) for name, facts in cells]
    return [group for group in groups if group.facts]
