from __future__ import annotations

from pathlib import Path

import pytest

from rwkvq.errors import SettingsError
from rwkvq.settings import Settings, apply_overrides, load, parse

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_params_are_valid() -> None:
    settings = load(ROOT / "params.yaml")
    assert settings.windows.samples == 128
    assert settings.plan.policy == "budget"


def test_a_preset_or_a_decision_asks_for_the_policy_that_has_them() -> None:
    assert parse({}, "x").plan.policy == "budget"
    assert parse({"plan": {"preset": "text"}}, "x").plan.policy == "rwkvquant"
    assert parse({"plan": {"decision": {"share": 0.5}}}, "x").plan.policy == "rwkvquant"
    assert parse({"plan": {"preset": "text", "policy": "sq"}}, "x").plan.policy == "sq"


def test_every_problem_is_in_one_line() -> None:
    values = {"windows": {"samples": "many", "lenght": 3}, "quantize": {"bits": 5}, "modell": "x"}
    with pytest.raises(SettingsError) as caught:
        parse(values, "params.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert len(caught.value.problems) == 4
    assert "windows.lenght: unknown key; known: source, field" in message
    assert "modell: unknown key" in message
    assert "quantize.bits" in message
    assert "found 'many'" in message


def test_types_are_strict() -> None:
    with pytest.raises(SettingsError, match="seed"):
        parse({"seed": "0"}, "params.yaml")
    with pytest.raises(SettingsError, match=r"quantize\.scalar\.symmetric"):
        parse({"quantize": {"scalar": {"symmetric": 1}}}, "params.yaml")


def test_overrides_reach_deep_keys_and_leave_the_rest() -> None:
    base = {"quantize": {"bits": 3, "damping": 0.02}}
    changed = parse(apply_overrides(base, ["quantize.bits=4", "plan.decision.mode=fixed"]), "x")
    assert (changed.quantize.bits, changed.quantize.damping, changed.plan.decision.mode) == (4, 0.02, "fixed")
    assert base == {"quantize": {"bits": 3, "damping": 0.02}}


@pytest.mark.parametrize("override", ["quantize.bits", "=3"])
def test_a_malformed_override_is_named(override: str) -> None:
    with pytest.raises(SettingsError, match=r"section\.key=value"):
        apply_overrides({}, [override])


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("model: !!python/object/apply:os.system ['touch /tmp/owned']\n")
    with pytest.raises(SettingsError, match="cannot be read as YAML"):
        load(path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "1: 2\n"])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match="mapping"):
        load(path)


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        load(tmp_path / "params.yaml")
    huge = tmp_path / "huge.yaml"
    huge.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(SettingsError, match="bytes"):
        load(huge)


def test_settings_survive_json() -> None:
    settings = load(ROOT / "params.yaml")
    assert parse(settings.model_dump(mode="json"), "json") == settings


def test_act_order_needs_static_groups() -> None:
    with pytest.raises(SettingsError, match="static_groups"):
        parse({"quantize": {"scalar": {"act_order": True}}}, "x")


def test_settings_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Settings().seed = 1  # type: ignore[misc]


def test_distillation_is_off_unless_steps_are_asked_for() -> None:
    assert parse({}, "x").distill.steps == load(ROOT / "params.yaml").distill.steps == 0
    for wrong in ({"steps": -1}, {"learning_rate": 0.0}, {"batch": 0}, {"patience": 0}):
        with pytest.raises(SettingsError, match=f"distill.{next(iter(wrong))}"):
            parse({"distill": wrong}, "x")
