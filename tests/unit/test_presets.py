"""Presets fill what the settings leave open; explicit values win."""

from __future__ import annotations

import pytest

from rwkvq.errors import SettingsError
from rwkvq.plan.presets import resolve_preset
from rwkvq.settings import (
    DecisionSettings,
    ElementwiseSettings,
    PlanSettings,
    QuantizeSettings,
    ScalarSettings,
    VectorSettings,
)


def test_presets_are_those_of_the_table() -> None:
    found = {
        name: resolve_preset(PlanSettings(preset=name), QuantizeSettings())  # type: ignore[arg-type]
        for name in ("text", "camera", "official", "rwkvq")
    }
    assert {name: item.decision.to_json() for name, item in found.items()} == {
        "text": {"mode": "share", "gap_mode": "unique", "share_by": "count", "share": 0.9},
        "camera": {"mode": "percentile", "gap_mode": "unique", "coarse": 0.5, "fine": 0.2},
        "official": {"mode": "maxrms", "gap_mode": "quantile", "max_over_rms": 8.0},
        "rwkvq": {"mode": "share", "gap_mode": "quantile", "share_by": "weights", "share": 0.1},
    }
    groups = {name: (item.scalar.group_size, item.scalar.clip_search) for name, item in found.items()}
    assert groups == {"text": (64, False), "camera": (32, False), "official": (64, False), "rwkvq": (64, True)}
    vectors = {name: item.vector for name, item in found.items()}
    assert {name: (arm.dimension, arm.group_rows, arm.group_columns) for name, arm in vectors.items()} == {
        "text": (2, 32, 64),
        "camera": (2, 64, 64),
        "official": (1, 2, 32),
        "rwkvq": (2, 64, 64),
    }
    assert {name: arm.svd_fraction for name, arm in vectors.items() if arm.svd_fraction != 1.0} == {"official": 0.5}
    assert {name: (item.elementwise.format, item.elementwise.weight) for name, item in found.items()} == {
        "text": ("vq", "second_moment"),
        "camera": ("vq", "second_moment"),
        "official": ("vq", "official"),
        "rwkvq": ("fp16", "second_moment"),
    }


def test_explicit_values_win() -> None:
    plan = PlanSettings(preset="camera", elementwise="int8", decision=DecisionSettings(coarse=0.4, gap_mode="raw"))
    quantize = QuantizeSettings(
        bits=4,
        scalar=ScalarSettings(group_size=128, symmetric=True, clip_search=True),
        vector=VectorSettings(group_rows=8, group_columns=16, m_step=False),
        elementwise=ElementwiseSettings(weight="none", percentile=95, block=32),
        damping=0.1,
    )
    found = resolve_preset(plan, quantize)
    assert found.decision.to_json() == {"mode": "percentile", "gap_mode": "raw", "coarse": 0.4, "fine": 0.2}
    assert (found.scalar.group_size, found.scalar.symmetric, found.scalar.clip_search) == (128, True, True)
    assert (found.vector.group_rows, found.vector.group_columns, found.vector.m_step) == (8, 16, False)
    assert (found.elementwise.format, found.elementwise.weight, found.elementwise.percentile) == ("int8", "none", 95)
    assert (found.bits, found.damping) == (4, 0.1)


def test_mode_fixed_uses_the_gap_set_of_the_published_thresholds() -> None:
    found = resolve_preset(PlanSettings(decision=DecisionSettings(mode="fixed")), QuantizeSettings()).decision
    assert found.to_json() == {"mode": "fixed", "gap_mode": "unique", "tau_c": 1.54, "tau_f": 30.0}


@pytest.mark.parametrize(
    ("values", "mode", "share_by"),
    [
        ({"tau_c": 1.5}, "fixed", "weights"),
        ({"fine": 0.3}, "percentile", "weights"),
        ({"share": 0.5}, "share", "weights"),
        ({"target_bits": 3.3}, "share", "bits"),
        ({"max_over_rms": 6.0}, "maxrms", "weights"),
        ({"mode": "share", "max_over_rms": 6.0, "tau_c": 1.0}, "share", "weights"),
    ],
)
def test_values_of_one_mode_choose_it(values: dict[str, float], mode: str, share_by: str) -> None:
    found = resolve_preset(PlanSettings(decision=DecisionSettings(**values)), QuantizeSettings()).decision  # type: ignore[arg-type]
    assert (found.mode, found.share_by) == (mode, share_by)


def test_values_of_two_modes_without_a_mode_are_refused() -> None:
    plan = PlanSettings(decision=DecisionSettings(tau_c=1.5, share=0.5))
    with pytest.raises(SettingsError, match=r"values of the modes fixed, share but no mode; set plan.decision.mode"):
        resolve_preset(plan, QuantizeSettings())


@pytest.mark.parametrize("policy", ["rtn", "sq", "kmeans", "vq", "awq", "rotation", "hqq", "residual"])
def test_baselines_do_not_depend_on_the_preset(policy: str) -> None:
    found = resolve_preset(PlanSettings(policy=policy, preset="official"), QuantizeSettings())  # type: ignore[arg-type]
    assert found == resolve_preset(PlanSettings(policy=policy), QuantizeSettings())  # type: ignore[arg-type]
    assert found.preset == "rwkvq"
    assert found.elementwise.format == "fp16"
    assert found.scalar.clip_search == (policy != "rtn")


def test_rtn_clips_only_when_told() -> None:
    quantize = QuantizeSettings(scalar=ScalarSettings(clip_search=True))
    assert resolve_preset(PlanSettings(policy="rtn"), quantize).scalar.clip_search


@pytest.mark.parametrize(
    ("bits", "dimension", "rows"), [(3, None, 64), (4, None, 256), (2, None, 16), (3, 1, 4), (2, 4, 512)]
)
def test_larger_codebooks_serve_more_rows(bits: int, dimension: int | None, rows: int) -> None:
    quantize = QuantizeSettings(bits=bits, vector=VectorSettings(dimension=dimension))  # type: ignore[arg-type]
    arm = resolve_preset(PlanSettings(policy="rwkvquant"), quantize).vector
    assert (arm.group_rows, arm.group_columns) == (rows, 64)
    # the codebook always costs a quarter bit a weight
    assert 2 ** (bits * arm.dimension) * arm.dimension * 8 / (rows * 64) == 0.25


def test_explicit_groups_are_left_alone() -> None:
    for settings in (VectorSettings(group_rows=64), VectorSettings(group_columns=64)):
        assert (
            resolve_preset(
                PlanSettings(policy="rwkvquant"), QuantizeSettings(bits=4, vector=settings)
            ).vector.group_rows
            == 64
        )


def test_decomposition_needs_one_dimension_and_eight_bits() -> None:
    with pytest.raises(SettingsError, match=r"svd_fraction needs dimension 1 and codebook_bits 8, found dimension 2"):
        resolve_preset(PlanSettings(policy="rwkvquant"), QuantizeSettings(vector=VectorSettings(svd_fraction=0.5)))
    official = PlanSettings(preset="official")
    for settings in (VectorSettings(dimension=2), VectorSettings(codebook_bits=16)):
        assert resolve_preset(official, QuantizeSettings(vector=settings)).vector.svd_fraction == 1.0
