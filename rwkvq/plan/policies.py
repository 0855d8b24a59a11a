"""Policies: from a model, its table of proxies and the settings to a plan. Nothing is quantized here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rwkvq.checkpoint.names import OUTER, Weight, weights_of
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.errors import PlanError
from rwkvq.formats import Layout
from rwkvq.plan import layouts
from rwkvq.plan.budget import Target, choose
from rwkvq.plan.candidates import CurvePoint, candidates_of
from rwkvq.plan.decide import Arm, Candidate, Verdict, decide
from rwkvq.plan.method_options import method_options
from rwkvq.plan.options import Method
from rwkvq.plan.outer import outer_candidates, outer_layout, outer_method, outer_options
from rwkvq.plan.plan import Plan
from rwkvq.plan.presets import Resolved, resolve_preset
from rwkvq.plan.size import file_bits, files_bits, size_in_bytes
from rwkvq.plan.tensor import PlannedTensor, ProxyValues
from rwkvq.proxies.table import Row
from rwkvq.settings import CurvesSettings, PlanSettings, Policy, QuantizeSettings

ARM_OF: Mapping[Policy, tuple[Arm, Method]] = {
    "rtn": ("sq", "rtn"),
    "sq": ("sq", "gptq"),
    "kmeans": ("vq", "kmeans"),
    "vq": ("vq", "gptvq"),
    "awq": ("sq", "awq"),
    "rotation": ("sq", "rotation"),
    "hqq": ("sq", "hqq"),
    "residual": ("vq", "residual"),
}
"""The arm and method of every matrix under the policies that decide nothing."""

DEFAULT_BPW = 3.275
"""Target of policy `budget`: the stored bits that the paper states for its models."""

METHOD_OF: Mapping[Arm, Method] = {"sq": "gptq", "vq": "gptvq"}
"""The method of each arm under policy `rwkvquant`."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """What becomes of one weight."""

    layout: Layout
    method: Method
    reason: str


@dataclass(frozen=True, slots=True)
class Curves:
    """What policy `budget` decides by: the table of stage `curves`, and the settings it was made with."""

    points: Sequence[CurvePoint]
    settings: CurvesSettings


def make_plan(
    source: Checkpoint,
    rows: Sequence[Row],
    plan: PlanSettings,
    quantize: QuantizeSettings,
    seed: int,
    curves: Curves | None = None,
) -> Plan:
    """Plan every weight of `source`.

    rows: its table of proxies, which policy `rwkvquant` needs and the others only record; curves: what policy `budget`
    needs. Raises PlanError for a group size that does not fit, a target that cannot be met, or a table of another
    model; SettingsError for settings that contradict each other.
    """
    settings = resolve_preset(plan, quantize)
    shapes = {name: source.shape(name) for name in source.names()}
    weights = weights_of(source.spec, shapes)
    table = _checked_rows(weights, rows)
    decided = [weight for weight in weights if _is_decided(weight, settings)]
    names = {weight.name for weight in decided}
    fixed = {w.name: _choose_fixed(w, source.dtype(w.tensor), settings) for w in weights if w.name not in names}
    if settings.policy == "budget":
        choices, decision = _spend(source, decided, fixed, plan, curves)
        thresholds: dict[str, float] = {}
    else:
        verdict = _judge(decided, table, settings)
        choices = {weight.name: _choose_arm(weight, settings, verdict) for weight in decided}
        decision = settings.decision.to_json() if settings.policy == "rwkvquant" else {}
        thresholds = dict(verdict.thresholds)
    choices |= fixed
    measured = curves.settings if curves is not None else CurvesSettings()
    return Plan(
        model_sha256=source.identity(),
        spec=source.spec,
        policy=settings.policy,
        preset=settings.preset,
        seed=seed,
        bits=settings.bits,
        decision=decision,
        thresholds=thresholds,
        tensors=tuple(
            _planned(weight, shapes[weight.tensor], choices[weight.name], table.get(weight.name), settings, measured)
            for weight in weights
        ),
        dropped=source.unused,
    )


def _spend(
    source: Checkpoint,
    decided: Sequence[Weight],
    fixed: Mapping[str, _Choice],
    plan: PlanSettings,
    curves: Curves | None,
) -> tuple[dict[str, _Choice], dict[str, str | float]]:
    """What policy `budget` gives the decided weights, and its target and prediction for the plan's header."""
    if curves is None:
        raise PlanError("policy budget: no table of curves; run the stage `curves` first")
    state_bits = curves.settings.state_bits
    candidates = {
        weight.name: outer_candidates(weight, source.dtype(weight.tensor))
        if weight.tensor in OUTER
        else candidates_of(weight, state_bits)
        for weight in decided
    }
    bpw = DEFAULT_BPW if plan.bpw is None else plan.bpw
    if plan.size is None:
        numel = sum(math.prod(weight.shape) for weight in decided)
        target = Target(f"plan.bpw {bpw:g}", int(bpw * numel))
    else:
        target = _size_target(source, plan.size, fixed)
    chosen = choose(decided, candidates, curves.points, target, plan.formats, plan.launch_groups)
    asked: dict[str, str | float] = {"bpw": bpw}
    if plan.size is not None and target.size is not None:
        asked = {"size": plan.size, "predicted_bytes": target.size - (target.bits - chosen.bits) // 8}
    choices = {
        name: _Choice(candidate.layout, candidate.method, chosen.reasons[name])
        for name, candidate in chosen.candidates.items()
    }
    decision = {**asked, "formats": plan.formats, "state_bits": state_bits, "predicted_kl": chosen.loss}
    if plan.launch_groups != "none":
        decision |= {"launch_groups": plan.launch_groups, "predicted_kl_without_groups": chosen.loss_without_groups}
    return choices, decision


def _size_target(source: Checkpoint, text: str, fixed: Mapping[str, _Choice]) -> Target:
    """What a weight file of this size leaves for the decided weights."""
    size, largest = size_in_bytes(text), 4 * sum(math.prod(source.shape(name)) for name in source.names())
    taken = sum(file_bits(name, choice.layout, largest) for name, choice in fixed.items())
    return Target(f"plan.size {text}", 8 * size - files_bits(size) - taken, size, largest)


def _planned(
    weight: Weight,
    tensor_shape: tuple[int, ...],
    choice: _Choice,
    row: Row | None,
    settings: Resolved,
    curves: CurvesSettings,
) -> PlannedTensor:
    # what is stored in 8 bits outside the arms gains nothing from cutting off extremes
    clip_search = settings.scalar.clip_search and _is_decided(weight, settings)
    return PlannedTensor(
        name=weight.name,
        tensor=weight.tensor,
        index=weight.index,
        transposed=weight.transposed,
        weight_class=weight.weight_class,
        block=weight.block,
        tensor_shape=tensor_shape,
        layout=choice.layout,
        method=choice.method,
        options=outer_options(choice.layout, choice.method, settings)
        if weight.tensor in OUTER
        else method_options(choice.method, settings, clip_search=clip_search, curves=curves),
        reason=choice.reason,
        proxies=_proxy_values(row, settings),
    )


def _is_decided(weight: Weight, settings: Resolved) -> bool:
    """True for the weights that go to one of the two arms, and those whose width the budget decides."""
    is_open = settings.outer_bits.get(weight.tensor) == "auto"
    return is_open or weight.weight_class == "matrix" or (weight.weight_class == "lora" and settings.lora == "quantize")


def _checked_rows(weights: Sequence[Weight], rows: Sequence[Row]) -> dict[str, Row]:
    """The table by name. Raises PlanError if it has rows of another model."""
    shapes = {weight.name: weight.shape for weight in weights}
    for row in rows:
        if shapes.get(row.name) != row.shape:
            raise PlanError(
                f"table of proxies: {row.name} is {list(row.shape)}, but the model has {shapes.get(row.name)} there; "
                "run the stage `proxies` again"
            )
    return {row.name: row for row in rows}


def _proxy_values(row: Row | None, settings: Resolved) -> ProxyValues | None:
    if row is None:
        return None
    mode = settings.decision.gap_mode
    measures = row.measures.of_mode(mode)
    return ProxyValues(p_c=measures.p_c, p_f=measures.p_f, gap_mode=mode)


def _judge(decided: Sequence[Weight], table: Mapping[str, Row], settings: Resolved) -> Verdict:
    """The arm of every decided weight."""
    if settings.policy != "rwkvquant":
        arm, _ = ARM_OF[settings.policy]
        reason = f"{arm}: policy {settings.policy} treats all matrices alike"
        return Verdict({weight.name: arm for weight in decided}, {weight.name: reason for weight in decided}, {})
    missing = [weight.name for weight in decided if weight.name not in table]
    if missing:
        raise PlanError(f"table of proxies: no row for {missing[0]} ({len(missing)} missing); run the stage `proxies`")
    return decide([_candidate(weight, table[weight.name], settings) for weight in decided], settings.decision)


def _candidate(weight: Weight, row: Row, settings: Resolved) -> Candidate:
    measures = row.measures.of_mode(settings.decision.gap_mode)
    return Candidate(
        name=weight.name,
        numel=row.numel,
        p_c=measures.p_c,
        p_f=measures.p_f,
        max_over_rms=row.measures.max_over_rms,
        sq_bits=layouts.scalar_layout(weight, settings, settings.bits)[0].stored_bits(),
        vq_bits=layouts.vector_layout(weight, settings)[0].stored_bits(),
    )


def _choose_fixed(weight: Weight, dtype: torch.dtype, settings: Resolved) -> _Choice:
    """Layout, method and reason of a weight that the settings alone decide."""
    if weight.weight_class == "elementwise":
        return _choose_elementwise(weight, dtype, settings)
    if weight.weight_class == "lora":
        if settings.lora == "fp16":
            return _Choice(layouts.half_layout(weight, dtype), "keep", "plan.lora is fp16")
        layout, remark = layouts.scalar_layout(weight, settings, 8)
        return _Choice(layout, "rtn", _joined("plan.lora is int8", remark))
    if weight.tensor in OUTER:
        bits = int(settings.outer_bits[weight.tensor])
        method = outer_method(weight, bits, guided=settings.policy == "budget")
        return _Choice(outer_layout(weight, dtype, bits), method, f"plan.{weight.tensor.split('.')[0]}_bits is {bits}")
    return _Choice(layouts.kept_layout(weight, dtype), "keep", "norms, biases and decay vectors are never quantized")


def _choose_arm(weight: Weight, settings: Resolved, verdict: Verdict) -> _Choice:
    arm = verdict.arms[weight.name]
    method = METHOD_OF[arm] if settings.policy == "rwkvquant" else ARM_OF[settings.policy][1]
    layout, remark = layouts.LAYOUT_OF[method](weight, settings)
    return _Choice(layout, method, _joined(verdict.reasons[weight.name], remark))


def _choose_elementwise(weight: Weight, dtype: torch.dtype, settings: Resolved) -> _Choice:
    chosen = settings.elementwise.format
    reason = f"plan.elementwise is {chosen}"
    if chosen == "vq":
        return _Choice(layouts.elementwise_layout(weight, settings), "elementwise", reason)
    if chosen == "fp16":
        return _Choice(layouts.half_layout(weight, dtype), "keep", reason)
    bits = 8 if chosen == "int8" else settings.bits
    return _Choice(layouts.elementwise_scalar_layout(weight, settings, bits), "rtn", reason)


def _joined(reason: str, remark: str) -> str:
    return f"{reason}; {remark}" if remark else reason
