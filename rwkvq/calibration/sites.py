"""Which sites of a block must be watched for a set of weights. What feeds each weight: checkpoint.names.Weight.site."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from rwkvq.checkpoint.names import Weight


@dataclass(frozen=True, slots=True)
class Needs:
    """What is to be collected at which site.

    moments: sites whose second moment is needed; weighted: by site, the weights that need one of their own with other
    weights of tokens; importance: by site, the element-wise weights that need its channels' importance.
    """

    moments: frozenset[str]
    importance: Mapping[str, tuple[str, ...]]
    weighted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def needs_of(wanted: Sequence[Weight], weighted: Collection[str] = ()) -> Needs:
    """What the weights `wanted` need: matrices and LoRA factors a second moment, element-wise weights an importance.

    Weights that share an input share its statistic, but for those that `weighted` names. Kept weights need nothing.
    """
    moments = set()
    own: dict[str, list[str]] = {}
    importance: dict[str, list[str]] = {}
    for weight in wanted:
        if weight.site and weight.weight_class == "elementwise":
            importance.setdefault(weight.site, []).append(weight.name)
        elif weight.site and weight.name in weighted:
            own.setdefault(weight.site, []).append(weight.name)
        elif weight.site and weight.weight_class in ("matrix", "lora"):
            moments.add(weight.site)
    return Needs(frozenset(moments), *({site: tuple(names) for site, names in by.items()} for by in (importance, own)))
