"""Embedding and head in a plan: the widths they may have, and what is done to round them (docs/method.md 14)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from rwkvq.checkpoint.names import Weight
from rwkvq.formats import Layout, ScalarLayout
from rwkvq.plan.candidates import Candidate
from rwkvq.plan.layouts import kept_layout
from rwkvq.plan.options import Method
from rwkvq.plan.presets import Resolved

WIDTHS = (4, 5, 6, 8)
"""Bits of a weight, scales apart; 16 is kept as it is."""
KEPT = 16
GROUP = 64
"""Columns, at most, that share a scale below 8 bits; at 8 bits a whole row does."""


def row_layout(weight: Weight, bits: int) -> ScalarLayout:
    """Symmetric groups of the rows of emb or head [vocab, width]."""
    rows, columns = weight.shape
    return ScalarLayout(rows, columns, bits, columns if bits == 8 else math.gcd(columns, GROUP), symmetric=True)


def outer_layout(weight: Weight, dtype: torch.dtype, bits: int) -> Layout:
    """The layout of emb or head in one of WIDTHS or KEPT."""
    return kept_layout(weight, dtype) if bits == KEPT else row_layout(weight, bits)


def outer_method(weight: Weight, bits: int, *, guided: bool) -> Method:
    """What rounds emb or head; guided: the second moment of the head's input is at hand (policy `budget`)."""
    if bits == KEPT:
        return "keep"
    return "gptq" if guided and weight.tensor == "head.weight" else "rtn"


def outer_candidates(weight: Weight, dtype: torch.dtype) -> tuple[Candidate, ...]:
    """Every width that policy `budget` may give emb or head [vocab, width] of `dtype`."""
    return tuple(
        Candidate(f"rows-{bits}", outer_layout(weight, dtype, bits), outer_method(weight, bits, guided=True))
        for bits in (*WIDTHS, KEPT)
    )


def outer_options(layout: Layout, method: Method, settings: Resolved) -> dict[str, Any]:
    """The options of the method that rounds emb or head, as plain values (plan.options.OPTIONS_OF)."""
    # 8 bits gain nothing from cutting off extremes
    clip_search = isinstance(layout, ScalarLayout) and layout.bits < 8
    options: Mapping[Method, dict[str, Any]] = {
        "keep": {},
        "rtn": {"clip_search": clip_search},
        "gptq": {
            "clip_search": clip_search,
            "static_groups": False,
            "act_order": False,
            "sweeps": settings.sweeps,
            "damping": settings.damping,
        },
    }
    return options[method]
