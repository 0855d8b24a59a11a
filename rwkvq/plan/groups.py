"""Launch groups: weights that one call of a kernel could decode, and that then must have one format and rate.

`block`: the products of a block that do not wait for each other and have one shape. `role`: a weight and those of its
role in all other blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rwkvq.checkpoint.names import Weight
from rwkvq.errors import PlanError
from rwkvq.plan.allocate import Option
from rwkvq.settings import LaunchGroups

_TOGETHER = (
    ("att.receptance.weight", "att.key.weight", "att.value.weight", "att.gate.weight"),
    ("att.w1", "att.a1", "att.v1", "att.g1"),
    ("att.w2", "att.a2", "att.v2", "att.g2"),
)
"""Names inside a block of the products that can be taken at once; so can the slices of one tensor."""


def launch_groups(weights: Sequence[Weight], kind: LaunchGroups) -> list[tuple[str, ...]]:
    """The names of the weights of every group, in the order of `weights`; kind `none`: each by itself."""
    groups: dict[object, list[str]] = {}
    for weight in weights:
        groups.setdefault(_key(weight, kind), []).append(weight.name)
    return [tuple(names) for names in groups.values()]


def _key(weight: Weight, kind: LaunchGroups) -> object:
    if kind == "none" or weight.block is None:
        return weight.name
    prefix = f"blocks.{weight.block}."
    if kind == "role":
        return weight.name.removeprefix(prefix), weight.shape
    own = weight.tensor.removeprefix(prefix)
    family = next((names[0] for names in _TOGETHER if own in names), own)
    return weight.block, family, weight.shape


def rate_of(label: str) -> str:
    """Format and rate of a candidate: its label without the widths of offsets, which differ inside a group."""
    return label.partition("-r")[0]


def merged(options: Mapping[str, Sequence[Option]], group: Sequence[str]) -> dict[str, tuple[Option, ...]]:
    """The formats and rates that all weights of a group can have: the options of each weight, in the group's order.

    A weight by itself has all of its options; in a group, of those with one rate, the one of least loss. Raises
    PlanError if there is none.
    """
    if len(group) == 1:
        return {option.label: (option,) for option in options[group[0]]}
    known = [_least(options[name]) for name in group]
    found = {rate: tuple(own[rate] for own in known) for rate in known[0] if all(rate in own for own in known)}
    if not found:
        raise PlanError(
            f"{group[0]}: no format fits it and the {len(group) - 1} weights of its launch group; use "
            "plan.launch_groups none"
        )
    return found


def _least(options: Sequence[Option]) -> dict[str, Option]:
    found: dict[str, Option] = {}
    for option in options:
        now = found.setdefault(rate_of(option.label), option)
        if (option.loss, option.bits) < (now.loss, now.bits):
            found[rate_of(option.label)] = option
    return found
