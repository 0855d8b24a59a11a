"""Which sites of a block must be watched for a set of weights. What feeds each weight: checkpoint.names.Weight.site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rwkvq.checkpoint.names import Weight


@dataclass(frozen=True, slots=True)
class Needs:
    """Sites whose second moment is needed, and sites whose channel importance is needed with the weights it is for."""

    moments: frozenset[str]
    importance: Mapping[str, tuple[str, ...]]


def needs_of(wanted: Sequence[Weight]) -> Needs:
    """What the weights `wanted` need: matrices and LoRA factors a second moment, element-wise weights an importance.

    Weights that share an input share its statistic. Kept weights need nothing.
    """
    moments = {weight.site for weight in wanted if weight.site and weight.weight_class in ("matrix", "lora")}
    importance: dict[str, list[str]] = {}
    for weight in wanted:
        if weight.site and weight.weight_class == "elementwise":
            importance.setdefault(weight.site, []).append(weight.name)
    return Needs(frozenset(moments), {site: tuple(names) for site, names in importance.items()})
