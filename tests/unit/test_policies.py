"""Plans of tiny models under every policy and preset."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkvq.checkpoint.names import weights_of
from rwkvq.checkpoint.reader import Checkpoint, open_checkpoint
from rwkvq.errors import PlanError
from rwkvq.formats import (
    DenseLayout,
    ElementwiseLayout,
    RotatedLayout,
    ScalarLayout,
    ScaledLayout,
    VectorLayout,
    pack_codes,
)
from rwkvq.plan.options import FORMAT_OF
from rwkvq.plan.plan import Plan, PlannedTensor
from rwkvq.plan.policies import make_plan
from rwkvq.proxies.table import Row, measure_block
from rwkvq.quantize.gptq import GptqOptions
from rwkvq.quantize.gptvq import GptvqOptions
from rwkvq.settings import DecisionSettings, PlanSettings, ProxiesSettings, QuantizeSettings, ScalarSettings
from tests.packed import codes_of
from tests.tiny import tiny_tensors, write_tensors, write_tiny

VERSIONS = ("x060", "x070")
POLICIES = ("rtn", "sq", "kmeans", "vq", "awq", "rotation", "hqq", "residual", "rwkvquant")
PRESETS = ("text", "camera", "official", "rwkvq")

Model = tuple[Checkpoint, list[Row]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("tiny")
    found = {}
    for version in VERSIONS:
        tensors = tiny_tensors(version, with_unused=version == "x070")  # type: ignore[arg-type]
        source = open_checkpoint(write_tensors(folder / f"{version}.safetensors", tensors))
        weights = weights_of(source.spec, {name: source.shape(name) for name in source.names()})
        found[version] = source, measure_block(source, weights, ProxiesSettings())
    return found


def plan_of(model: Model, *, quantize: QuantizeSettings | None = None, **plan: object) -> Plan:
    source, rows = model
    settings = PlanSettings(**{"policy": "rwkvquant"} | plan)  # type: ignore[arg-type]
    return make_plan(source, rows, settings, quantize or QuantizeSettings(), 7)


def decided(plan: Plan) -> list[PlannedTensor]:
    return [entry for entry in plan.tensors if entry.weight_class in ("matrix", "lora")]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_weight_is_planned_once(models: dict[str, Model], version: str, policy: str) -> None:
    source, _ = models[version]
    plan = plan_of(models[version], policy=policy)
    names = [weight.name for weight in weights_of(source.spec, {name: source.shape(name) for name in source.names()})]
    assert [entry.name for entry in plan.tensors] == names
    assert (plan.model_sha256, plan.spec, plan.policy, plan.seed, plan.bits) == (
        source.identity(),
        source.spec,
        policy,
        7,
        3,
    )
    assert plan.dropped == source.unused
    methods = {entry.method for entry in decided(plan)}
    of_policy = {"rwkvquant": {"gptq", "gptvq"}, "sq": {"gptq"}, "vq": {"gptvq"}}
    assert methods == of_policy.get(policy, {policy})  # the other baselines are named as their methods
    for entry in plan.tensors:
        assert entry.layout.format == FORMAT_OF[entry.method]
        assert entry.reason
        assert (entry.proxies is None) == (entry.weight_class == "keep")
    plan.check_model(source)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_stated_bits_are_the_packed_bits(models: dict[str, Model], version: str, preset: str) -> None:
    plan = plan_of(models[version], preset=preset)
    codes = codes_of(plan)
    for entry in plan.tensors:
        if entry.method == "keep":
            assert isinstance(entry.layout, DenseLayout)
            assert entry.stored_bits == 16 * entry.numel
        else:
            packed = pack_codes(codes[entry.name])
            assert entry.stored_bits == 8 * sum(part.numel() * part.element_size() for part in packed.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_decide_as_they_say(models: dict[str, Model], preset: str) -> None:
    plan = plan_of(models["x070"], preset=preset)
    entries = decided(plan)
    scalar = [entry for entry in entries if entry.method == "gptq"]
    share = len(scalar) / len(entries)
    weights = sum(entry.numel for entry in scalar) / sum(entry.numel for entry in entries)
    expected = {
        "text": share >= 0.9,
        "camera": len(scalar) == 3,
        "official": share == 1.0,
        "rwkvq": 0.1 <= weights < 0.3,
    }
    assert len(entries) == 26
    assert expected[preset], (share, weights)
    assert plan.decision["mode"] == {"camera": "percentile", "official": "maxrms"}.get(preset, "share")
    assert set(plan.thresholds) == ({"max_over_rms"} if preset == "official" else {"tau_c", "tau_f"})
    for entry in entries:
        assert entry.reason.startswith("sq: " if entry.method == "gptq" else "vq: ")


def test_recorded_thresholds_give_the_same_plan(models: dict[str, Model]) -> None:
    first = plan_of(models["x060"], preset="camera")
    again = plan_of(models["x060"], preset="camera", decision=DecisionSettings(mode="fixed", **first.thresholds))
    assert [entry.layout for entry in again.tensors] == [entry.layout for entry in first.tensors]


def test_published_thresholds_use_the_unique_gaps(models: dict[str, Model]) -> None:
    plan = plan_of(models["x070"], decision=DecisionSettings(mode="fixed"))
    assert {entry.proxies["gap_mode"] for entry in plan.tensors if entry.proxies} == {"unique"}


def test_narrow_lora_factors_say_why_their_groups_differ(models: dict[str, Model]) -> None:
    entries = {entry.name: entry for entry in plan_of(models["x070"], policy="sq").tensors}
    narrow = entries["blocks.1.att.v2"]
    assert narrow.layout == ScalarLayout(128, 16, 3, 16, False)
    assert narrow.reason.endswith("; groups of 16, because 64 does not divide 16 columns")
    assert entries["blocks.1.att.key.weight"].reason == "sq: policy sq treats all matrices alike"


def test_slices_of_one_tensor_are_planned_one_by_one(models: dict[str, Model]) -> None:
    slices = [entry for entry in plan_of(models["x060"]).tensors if entry.tensor == "blocks.0.att.time_maa_w2"]
    assert [entry.index for entry in slices] == [0, 1, 2, 3, 4]
    assert all(entry.tensor_shape == (5, 16, 128) and entry.shape == (128, 16) for entry in slices)
    assert len({entry.proxies["p_c"] for entry in slices if entry.proxies}) == 5


@pytest.mark.parametrize(
    ("mode", "layout", "method"),
    [
        ("vq", ElementwiseLayout(128, 8, 64), "elementwise"),
        ("rtn", ScalarLayout(1, 128, 3, 64, False), "rtn"),
        ("int8", ScalarLayout(1, 128, 8, 64, False), "rtn"),
        ("fp16", DenseLayout((128,), "bfloat16"), "keep"),
    ],
)
def test_element_wise_formats(models: dict[str, Model], mode: str, layout: object, method: str) -> None:
    entries = [
        entry for entry in plan_of(models["x070"], elementwise=mode).tensors if entry.weight_class == "elementwise"
    ]
    assert Counter(entry.method for entry in entries) == {method: 20}
    assert {entry.layout for entry in entries} == {layout}
    assert {entry.reason for entry in entries} == {f"plan.elementwise is {mode}"}
    assert not any(entry.options.get("clip_search") for entry in entries)


def test_lora_formats(models: dict[str, Model]) -> None:
    for lora, method, kind in (("int8", "rtn", ScalarLayout), ("fp16", "keep", DenseLayout)):
        entries = {entry.name: entry for entry in plan_of(models["x070"], lora=lora).tensors}
        factor = entries["blocks.0.att.g1"]
        assert factor.method == method
        assert isinstance(factor.layout, kind)
        assert factor.reason.startswith(f"plan.lora is {lora}")
        assert not factor.options.get("clip_search", False)
    assert plan_of(models["x070"], lora="int8").tensors != plan_of(models["x070"]).tensors


def test_embedding_and_head_in_8_bits(models: dict[str, Model]) -> None:
    entries = {entry.name: entry for entry in plan_of(models["x060"], emb_bits=8).tensors}
    assert entries["emb.weight"].layout == ScalarLayout(320, 128, 8, 128, True)
    assert (entries["emb.weight"].method, entries["emb.weight"].reason) == ("rtn", "plan.emb_bits is 8")
    assert entries["head.weight"].layout == DenseLayout((320, 128), "bfloat16")
    assert entries["head.weight"].reason == "plan.head_bits is 16"


def test_kept_tensors_stay_in_their_dtype(tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny(tmp_path / "float32.safetensors", "x070", dtype=torch.float32))
    plan = make_plan(source, [], PlanSettings(policy="sq"), QuantizeSettings(), 0)
    dtypes = {entry.name: entry.layout.dtype for entry in plan.tensors if isinstance(entry.layout, DenseLayout)}
    assert dtypes["blocks.0.ln1.weight"] == dtypes["emb.weight"] == "float32"
    assert dtypes["blocks.0.att.x_r"] == "float16"


def test_options_are_those_of_the_quantizers(models: dict[str, Model]) -> None:
    quantize = QuantizeSettings(scalar=ScalarSettings(static_groups=True, act_order=True), damping=0.05)
    for entry in plan_of(models["x070"], quantize=quantize, preset="text").tensors:
        if entry.method == "gptq":
            expected = GptqOptions(clip_search=False, static_groups=True, act_order=True, damping=0.05)
            assert GptqOptions.from_json(entry.options) == expected
        elif entry.method == "gptvq":
            assert GptvqOptions.from_json(entry.options) == GptvqOptions(damping=0.05)
        elif entry.method == "elementwise":
            assert entry.options == {"weight": "second_moment", "percentile": 99}


def test_baselines_around_the_scalar_format_store_a_part_more(models: dict[str, Model]) -> None:
    plain = {entry.name: entry for entry in decided(plan_of(models["x070"], policy="sq"))}
    quantize = QuantizeSettings(scalar=ScalarSettings(clip_search=False))
    for policy, kind in (("awq", ScaledLayout), ("rotation", RotatedLayout)):
        entries = decided(plan_of(models["x070"], policy=policy))
        assert {entry.layout for entry in entries} == {kind(plain[entry.name].layout) for entry in entries}
        assert {entry.options["clip_search"] for entry in entries} == {True}
        unclipped = decided(plan_of(models["x070"], policy=policy, quantize=quantize))
        assert {entry.options["clip_search"] for entry in unclipped} == {False}
    assert [entry.options for entry in entries] == [entry.options for entry in plain.values()]


def test_bits_reach_both_arms(models: dict[str, Model]) -> None:
    plan = plan_of(models["x070"], quantize=QuantizeSettings(bits=2))
    assert plan.bits == 2
    assert {entry.layout.bits for entry in decided(plan) if isinstance(entry.layout, ScalarLayout)} == {2}
    assert {entry.layout.entries for entry in decided(plan) if isinstance(entry.layout, VectorLayout)} == {16}


def test_tables_that_do_not_fit_are_refused(models: dict[str, Model]) -> None:
    source, rows = models["x070"]
    arguments = PlanSettings(policy="rwkvquant"), QuantizeSettings(), 0
    short = [row for row in rows if row.name != "blocks.1.att.key.weight"]
    with pytest.raises(PlanError, match=r"no row for blocks.1.att.key.weight \(1 missing\)"):
        make_plan(source, short, *arguments)
    other = [replace(row, shape=(64, 64)) if row.name == "blocks.1.att.key.weight" else row for row in rows]
    with pytest.raises(PlanError, match=r"blocks.1.att.key.weight is \[64, 64\]"):
        make_plan(source, other, *arguments)
    with pytest.raises(PlanError, match=r"blocks.0.att.time_maa_x is \[128\]"):
        make_plan(source, models["x060"][1], *arguments)


def test_group_size_that_does_not_divide_names_the_tensor(models: dict[str, Model]) -> None:
    with pytest.raises(PlanError, match=r"^blocks.0.att.receptance.weight: quantize.scalar.group_size 48 does not"):
        plan_of(models["x070"], quantize=QuantizeSettings(scalar=ScalarSettings(group_size=48)))
