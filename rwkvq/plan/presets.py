"""Presets (docs/method.md 11): settings of a published or recommended configuration; explicit values win."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from rwkvq.errors import SettingsError
from rwkvq.settings import (
    DecisionMode,
    DecisionSettings,
    GapMode,
    OuterBits,
    PlanSettings,
    Policy,
    Preset,
    QuantizeSettings,
    ShareBy,
    VectorSettings,
)

ElementwiseFormat = Literal["vq", "rtn", "int8", "fp16"]
ElementwiseWeight = Literal["second_moment", "mean_sq", "official", "none"]
_Value = TypeVar("_Value")

PRESET_BITS = 3
"""Bits that the presets' groups are made for."""
HQQ_GROUP = 128
"""Scale and zero point of policy `hqq` take 32 bits: a quarter of a bit a weight."""
DAMPING, BUDGET_DAMPING = 0.01, 0.1
"""Policy budget takes more: it costs nothing on text like the calibration's and helps on other text (docs/evidence.md).
"""
RESIDUAL_DIMENSION = 4
"""Weights that share a code of policy `residual`, where the weight is large enough for its codebooks."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How policy `rwkvquant` decides; a mode reads only its own fields.

    fixed: tau_c, tau_f; percentile: coarse (C), fine (F); share: share of SQ by count or weights, or target_bits,
    stored bits per matrix weight, by bits; maxrms: max_over_rms.
    """

    mode: DecisionMode
    gap_mode: GapMode
    tau_c: float
    tau_f: float
    coarse: float
    fine: float
    share: float
    share_by: ShareBy
    target_bits: float
    max_over_rms: float

    def to_json(self) -> dict[str, str | float]:
        """Mode, gap mode and the values that the mode reads."""
        by_bits = self.share_by == "bits"
        target: dict[str, str | float] = {"target_bits": self.target_bits} if by_bits else {"share": self.share}
        values: Mapping[DecisionMode, dict[str, str | float]] = {
            "fixed": {"tau_c": self.tau_c, "tau_f": self.tau_f},
            "percentile": {"coarse": self.coarse, "fine": self.fine},
            "share": {"share_by": self.share_by, **target},
            "maxrms": {"max_over_rms": self.max_over_rms},
        }
        return {"mode": self.mode, "gap_mode": self.gap_mode} | values[self.mode]


@dataclass(frozen=True, slots=True)
class ScalarArm:
    """The SQ arm: groups of `group_size` input columns, and how their grids are chosen."""

    group_size: int
    symmetric: bool
    clip_search: bool
    static_groups: bool = False
    act_order: bool = False


@dataclass(frozen=True, slots=True)
class VectorArm:
    """The VQ arm: codebooks of 2**(bits * dimension) entries, one for group_rows x group_columns weights.

    svd_fraction: kept share of the codebooks' singular values, 1.0 = no decomposition.
    """

    dimension: int
    group_rows: int
    group_columns: int
    svd_fraction: float = 1.0
    codebook_bits: int = 8
    iterations: int = 100
    exact_assignment: bool = True
    m_step: bool = True


@dataclass(frozen=True, slots=True)
class ElementwiseArm:
    """What becomes of element-wise weights; weight and percentile say how channels count in format `vq`."""

    format: ElementwiseFormat
    weight: ElementwiseWeight
    percentile: float = 99
    block: int = 64
    entries: int = 8


@dataclass(frozen=True, slots=True)
class Resolved:
    """All that decides a plan, with every default filled in."""

    policy: Policy
    preset: Preset
    bits: int
    sweeps: int
    damping: float
    decision: Decision
    scalar: ScalarArm
    vector: VectorArm
    elementwise: ElementwiseArm
    lora: Literal["quantize", "int8", "fp16"]
    outer_bits: Mapping[str, OuterBits]
    """Of embedding and head, by tensor; auto = the budget decides."""


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What a preset sets."""

    decision: Decision
    scalar: ScalarArm
    vector: VectorArm
    elementwise: ElementwiseArm
    sweeps: int = 0


def _decision(mode: DecisionMode, gap_mode: GapMode, share: float, share_by: ShareBy, bits: float) -> Decision:
    """A preset's decision; the values of the other modes are the published ones (arXiv 2505.03803 4.1, Alg. 1)."""
    return Decision(mode, gap_mode, 1.54, 30.0, 0.5, 0.2, share, share_by, bits, 8.0)


PRESETS: Mapping[Preset, _Defaults] = {
    "text": _Defaults(
        _decision("share", "unique", 0.9, "count", 3.325),
        ScalarArm(64, symmetric=False, clip_search=False),
        VectorArm(2, 32, 64),
        ElementwiseArm("vq", "second_moment"),
    ),
    "camera": _Defaults(
        _decision("percentile", "unique", 0.1, "count", 3.3),
        ScalarArm(32, symmetric=False, clip_search=False),
        VectorArm(2, 64, 64),
        ElementwiseArm("vq", "second_moment"),
    ),
    "official": _Defaults(
        _decision("maxrms", "quantile", 0.9, "count", 3.325),
        ScalarArm(64, symmetric=False, clip_search=False),
        VectorArm(1, 2, 32, svd_fraction=0.5),
        ElementwiseArm("vq", "official"),
    ),
    "rwkvq": _Defaults(
        _decision("share", "quantile", 0.1, "weights", 3.275),
        ScalarArm(64, symmetric=False, clip_search=True),
        VectorArm(2, 64, 64),
        ElementwiseArm("fp16", "second_moment"),
        sweeps=2,
    ),
}

_MODE_OF: Mapping[str, DecisionMode] = {
    "tau_c": "fixed",
    "tau_f": "fixed",
    "coarse": "percentile",
    "fine": "percentile",
    "share": "share",
    "share_by": "share",
    "target_bits": "share",
    "max_over_rms": "maxrms",
}


def _or(explicit: _Value | None, default: _Value) -> _Value:
    return default if explicit is None else explicit


def _outer_bits(plan: PlanSettings, bits: OuterBits) -> OuterBits:
    """Only a budget of the whole file leaves the width of embedding or head open."""
    is_open = plan.policy == "budget" and plan.size is not None
    return bits if bits != "auto" or is_open else 16


def _resolve_decision(settings: DecisionSettings, default: Decision) -> Decision:
    """Fill in the decision; values of one mode choose that mode if none is set. Raises SettingsError for two modes."""
    implied = {mode for name, mode in _MODE_OF.items() if getattr(settings, name) is not None}
    if settings.mode is None and len(implied) > 1:
        listed = ", ".join(sorted(implied))
        raise SettingsError("plan.decision", [f"has values of the modes {listed} but no mode; set plan.decision.mode"])
    mode = settings.mode or (implied.pop() if implied else default.mode)
    by_bits = settings.target_bits is not None and settings.share is None
    return Decision(
        mode=mode,
        # the published thresholds fit the gap set of the released code only
        gap_mode=_or(settings.gap_mode, "unique" if mode == "fixed" else default.gap_mode),
        tau_c=_or(settings.tau_c, default.tau_c),
        tau_f=_or(settings.tau_f, default.tau_f),
        coarse=_or(settings.coarse, default.coarse),
        fine=_or(settings.fine, default.fine),
        share=_or(settings.share, default.share),
        share_by=_or(settings.share_by, "bits" if by_bits else default.share_by),
        target_bits=_or(settings.target_bits, default.target_bits),
        max_over_rms=_or(settings.max_over_rms, default.max_over_rms),
    )


def _group_rows(settings: VectorSettings, default: VectorArm, bits: int, dimension: int) -> int:
    """Rows of a VQ group: a codebook larger than the preset's serves more rows, so that it costs the same a weight."""
    if settings.group_rows is not None:
        return settings.group_rows
    if settings.group_columns is not None:
        return default.group_rows
    entries_times_dimension = (1 << (bits * dimension)) * dimension
    published = (1 << (PRESET_BITS * default.dimension)) * default.dimension
    return max(1, default.group_rows * entries_times_dimension // published)


def _resolve_vector(settings: VectorSettings, default: VectorArm, bits: int) -> VectorArm:
    """Fill in the VQ arm. Raises SettingsError if an explicit svd_fraction does not fit."""
    dimension = _or(settings.dimension, default.dimension)
    can_decompose = dimension == 1 and settings.codebook_bits == 8
    if settings.svd_fraction is not None and not can_decompose:
        found = f"found dimension {dimension} and codebook_bits {settings.codebook_bits}"
        raise SettingsError("quantize.vector", [f"svd_fraction needs dimension 1 and codebook_bits 8, {found}"])
    return VectorArm(
        dimension=dimension,
        group_rows=_group_rows(settings, default, bits, dimension),
        group_columns=_or(settings.group_columns, default.group_columns),
        # a preset's decomposition is dropped where the explicit values rule it out
        svd_fraction=_or(settings.svd_fraction, default.svd_fraction) if can_decompose else 1.0,
        codebook_bits=settings.codebook_bits,
        iterations=settings.iterations,
        exact_assignment=settings.exact_assignment,
        m_step=settings.m_step,
    )


def resolve_preset(plan: PlanSettings, quantize: QuantizeSettings) -> Resolved:
    """Fill every value that the settings leave open from the preset.

    The policies that decide nothing are baselines: they take what is open from preset `rwkvq` whatever the preset, so
    that they mean the same beside every preset, but no sweeps; rtn alone rounds to the plain minimum and maximum unless
    clip_search is set, hqq has groups of HQQ_GROUP and residual vectors of RESIDUAL_DIMENSION. Policy budget takes one
    sweep and more damping. Raises SettingsError for values that contradict each other.
    """
    preset: Preset = plan.preset if plan.policy == "rwkvquant" else "rwkvq"
    default = PRESETS[preset]
    arm = default.vector if plan.policy != "residual" else replace(default.vector, dimension=RESIDUAL_DIMENSION)
    scalar, elementwise = quantize.scalar, quantize.elementwise
    return Resolved(
        policy=plan.policy,
        preset=preset,
        bits=quantize.bits,
        sweeps=_or(quantize.sweeps, {"rwkvquant": default.sweeps, "budget": 1}.get(plan.policy, 0)),
        damping=_or(quantize.damping, BUDGET_DAMPING if plan.policy == "budget" else DAMPING),
        decision=_resolve_decision(plan.decision, default.decision),
        scalar=ScalarArm(
            group_size=_or(scalar.group_size, HQQ_GROUP if plan.policy == "hqq" else default.scalar.group_size),
            symmetric=_or(scalar.symmetric, default.scalar.symmetric),
            clip_search=_or(scalar.clip_search, default.scalar.clip_search and plan.policy != "rtn"),
            static_groups=scalar.static_groups,
            act_order=scalar.act_order,
        ),
        vector=_resolve_vector(quantize.vector, arm, quantize.bits),
        elementwise=ElementwiseArm(
            format=_or(plan.elementwise, default.elementwise.format),
            weight=_or(elementwise.weight, default.elementwise.weight),
            percentile=elementwise.percentile,
            block=elementwise.block,
            entries=elementwise.entries,
        ),
        lora=plan.lora,
        outer_bits={"emb.weight": _outer_bits(plan, plan.emb_bits), "head.weight": _outer_bits(plan, plan.head_bits)},
    )
