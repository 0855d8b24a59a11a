"""plan.json: round trip, what an edit may and may not do, differences."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.errors import PlanError
from rwkvq.formats import DenseLayout, ScalarLayout
from rwkvq.plan.options import checked_options
from rwkvq.plan.plan import Plan, diff
from rwkvq.plan.policies import make_plan
from rwkvq.settings import PlanSettings, QuantizeSettings
from tests.packed import plan_of, tiny_source

KEY = "blocks.0.att.key.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_source(tmp_path_factory.mktemp("tiny"), "x070")


@pytest.fixture(scope="module")
def plan(source: Checkpoint) -> Plan:
    return make_plan(source, [], PlanSettings(policy="sq"), QuantizeSettings(), 0)


@pytest.fixture
def values(plan: Plan) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(plan.to_json()))
    return copied


def row(values: dict[str, Any], name: str = KEY) -> dict[str, Any]:
    return next(item for item in values["tensors"] if item["name"] == name)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_round_trip_with_every_format(version: str, tmp_path: Path) -> None:
    made = plan_of(tiny_source(tmp_path, version))  # type: ignore[arg-type]
    path = tmp_path / "plan.json"
    made.write(path)
    assert Plan.read(path) == made
    first = path.read_bytes()
    Plan.read(path).write(path)
    assert path.read_bytes() == first


def test_derived_numbers_may_be_left_out(values: dict[str, Any], plan: Plan) -> None:
    del values["totals"]
    for item in values["tensors"]:
        del item["stored_bits"], item["bits_per_weight"]
    assert Plan.from_json(values) == plan


def test_an_edited_layout_is_taken(values: dict[str, Any]) -> None:
    edited = row(values)
    edited["layout"] |= {"bits": 4, "symmetric": True}
    edited["stored_bits"] = 128 * 128 * 4 + 128 * 2 * 16
    edited["reason"] = "by hand"
    found = next(entry for entry in Plan.from_json(values).tensors if entry.name == KEY)
    assert found.layout == ScalarLayout(128, 128, 4, 64, True)


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        row(values)[key] = value

    return change


def _header(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values[key] = value

    return change


def _remove(values: dict[str, Any]) -> None:
    values["tensors"] = [item for item in values["tensors"] if item["name"] != KEY]


def _repeat(values: dict[str, Any]) -> None:
    values["tensors"].append(row(values))


def _rename(values: dict[str, Any]) -> None:
    row(values)["name"] = "blocks.0.att.kay.weight"


def _to_vector(values: dict[str, Any]) -> None:
    row(values)["format"] = "vector"


def _keep_as_scalar(values: dict[str, Any]) -> None:
    row(values).update(method="keep", options={})


def _wrong_layout_shape(values: dict[str, Any]) -> None:
    row(values)["layout"]["rows"] = 64


def _group_of_48(values: dict[str, Any]) -> None:
    row(values)["layout"]["group_size"] = 48


def _drop_reason(values: dict[str, Any]) -> None:
    del row(values)["reason"]


def _many_blocks(values: dict[str, Any]) -> None:
    values["spec"]["layers"] = 10**9


def _other_width(values: dict[str, Any]) -> None:
    values["spec"] |= {"width": 256, "heads": 4}


BAD_EDITS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_set("format", "lattice"), rf"{KEY}: format 'lattice' is unknown; known: dense, scalar"),
    (_set("method", "magic"), rf"{KEY}: method 'magic' is unknown; known: keep, rtn, gptq"),
    (_keep_as_scalar, rf"{KEY}: method keep writes format dense, but the row has format scalar"),
    (_to_vector, rf"{KEY}: vector layout: found keys"),
    (_wrong_layout_shape, rf"{KEY}: scalar layout is for shape \[64, 128\], but the weight is \[128, 128\]"),
    (_group_of_48, rf"{KEY}: scalar layout: group_size 48 does not divide 128 columns"),
    (_set("stored_bits", 1), rf"{KEY}: stored_bits is 1, but its layout stores 54016; write that number or remove"),
    (_set("stored_bits", "x"), rf"{KEY}: stored_bits is 'x'"),
    (_set("layout", []), rf"{KEY}: scalar layout: found list"),
    (_set("options", {}), rf"{KEY}: options of method gptq are none, expected clip_search, static_groups"),
    (_set("options", 3), rf"{KEY}: options of method gptq are 3"),
    (_set("block", 1), rf"{KEY}: block is 1, but the model's is 0; restore it"),
    (_set("block", "0"), rf"{KEY}: block is '0', expected null or a whole number"),
    (_set("class", "lora"), rf"{KEY}: class is 'lora', but the model's is 'matrix'"),
    (_set("class", "vector"), rf"{KEY}: class 'vector' is unknown"),
    (_set("transposed", 1), rf"{KEY}: transposed is 1, expected a value of type bool"),
    (_set("index", 0), rf"{KEY}: class matrix with tensor_shape \[128, 128\], expected two axes"),
    (_set("index", 200), rf"{KEY}: index 200 is outside tensor_shape"),
    (_set("tensor_shape", [128, -128]), rf"{KEY}: tensor_shape is \[128, -128\], expected 1 to 3 positive integers"),
    (_set("tensor_shape", "128"), rf"{KEY}: tensor_shape is '128'"),
    (_set("proxies", {"p_c": 1}), rf"{KEY}: proxies must be null or hold p_c, p_f and gap_mode"),
    (_set("proxies", {"p_c": "1", "p_f": 1, "gap_mode": "raw"}), rf"{KEY}: proxies p_c and p_f are \['1', 1\]"),
    (_set("note", "x"), rf"{KEY}: missing keys: none; unknown keys: note"),
    (_drop_reason, rf"{KEY}: missing keys: reason; unknown keys: none"),
    (_remove, rf"1 weights are missing \(first: {KEY}\), 0 are unknown"),
    (_repeat, rf"{KEY}: planned 2 times, expected once"),
    (_rename, r"1 weights are missing .*, 1 are unknown \(first: blocks.0.att.kay.weight\)"),
    (_many_blocks, r"spec has 1000000000 blocks, but only \d+ weights are planned"),
    (_other_width, r"emb.weight: tensor_shape is \[320, 128\], but the model's is \[320, 256\]"),
    (_header("format", "rwkvq-plan/9"), r"format is 'rwkvq-plan/9', expected 'rwkvq-plan/1'"),
    (_header("policy", "best"), r"policy is best, expected one of rtn, sq"),
    (_header("preset", None), r"preset is None, expected one of text"),
    (_header("seed", -1), r"seed is -1, expected a whole number"),
    (_header("bits", True), r"bits is True, expected a whole number from 1 to 8"),
    (_header("model_sha256", "abc"), r"model_sha256 is abc, expected 64 hexadecimal digits"),
    (_header("thresholds", {"tau_c": "high"}), r"thresholds is .*, expected an object of numbers"),
    (_header("decision", 5), r"decision is 5, expected an object"),
    (_header("dropped", ["emb.weight"]), r"dropped names 'emb.weight', which the model uses or does not have"),
    (_header("tensors", {}), r"tensors is \{\}, expected a list of rows"),
    (_header("tensors", [5]), r"a row of `tensors` has no name"),
    (_header("spec", None), r"spec: model description"),
    (_header("extra", 1), r"missing keys: none; unknown keys: extra"),
]


@pytest.mark.parametrize(("change", "message"), BAD_EDITS)
def test_bad_edits_are_refused_in_one_line(
    change: Callable[[dict[str, Any]], None], message: str, values: dict[str, Any], tmp_path: Path
) -> None:
    change(values)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    with pytest.raises(PlanError, match=message) as caught:
        Plan.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("clip_search", 1, "true or false"),
        ("damping", 0, "a number from 1e-09 to 1"),
        ("damping", 2.0, "a number from 1e-09 to 1"),
        ("damping", True, "a number from 1e-09 to 1"),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: Any, expected: str, values: dict[str, Any]) -> None:
    row(values)["options"][option] = value
    with pytest.raises(PlanError, match=rf"{KEY}: option {option} of method gptq is {value!r}, expected {expected}"):
        Plan.from_json(values)


def test_act_order_needs_static_groups(values: dict[str, Any]) -> None:
    row(values)["options"]["act_order"] = True
    with pytest.raises(PlanError, match="act_order needs static_groups"):
        Plan.from_json(values)


def test_elementwise_percentile_has_a_range(values: dict[str, Any]) -> None:
    row(values, "blocks.0.att.x_r").update(
        format="elementwise",
        layout={"size": 128, "entries": 8, "block": 64},
        method="elementwise",
        options={"weight": "none", "percentile": 9},
    )
    with pytest.raises(
        PlanError, match=r"option percentile of method elementwise is 9, expected a number from 50 to 100"
    ):
        Plan.from_json(values)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format": NaN}', "[]", "3", '"plan"', "\ufeff{}"])
def test_what_is_no_plan_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        Plan.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no such plan; run the stage `plan` first"):
        Plan.read(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read as JSON"):
        Plan.read(tmp_path / "plan.json")


def test_plan_of_another_model_is_refused(source: Checkpoint, plan: Plan, tmp_path: Path) -> None:
    plan.check_model(source)
    other = tiny_source(tmp_path, "x070", seed=1)
    with pytest.raises(
        PlanError, match=r"plan of another model: it was made for [0-9a-f]{12}\.\.\., but .*x070.safetensors"
    ):
        plan.check_model(other)
    wider = replace(plan, tensors=tuple(replace(entry, tensor_shape=(5, 5)) for entry in plan.tensors))
    with pytest.raises(PlanError, match=r"emb.weight: tensor_shape is \[5, 5\], but .* holds \[320, 128\]"):
        wider.check_model(source)


def test_equal_plans_do_not_differ(plan: Plan) -> None:
    assert diff(plan, Plan.from_json(plan.to_json())) == []


def test_differences_are_readable(plan: Plan) -> None:
    def edited(entry: Any) -> Any:
        if entry.name == KEY:
            return replace(entry, layout=replace(entry.layout, bits=4), options=entry.options | {"damping": 0.1})
        if entry.name == "blocks.1.ffn.key.weight":
            layout = DenseLayout(entry.shape, "float16")
            return replace(entry, layout=layout, method="keep", options={}, reason="by hand")
        return entry

    tensors = tuple(edited(entry) for entry in plan.tensors if entry.name != "blocks.1.att.g2")
    other = replace(plan, seed=1, thresholds={"tau_c": 1.5}, tensors=tensors)
    assert [str(item) for item in diff(plan, other)] == [
        "plan: seed 0 -> 1",
        'plan: thresholds {} -> {"tau_c": 1.5}',
        f"{KEY}: layout.bits 3 -> 4",
        f"{KEY}: options.damping 0.01 -> 0.1",
        f"{KEY}: stored_bits 54016 -> 70656",
        "blocks.1.att.g2: planned true -> false",
        "blocks.1.ffn.key.weight: format scalar -> dense",
        "blocks.1.ffn.key.weight: method gptq -> keep",
        "blocks.1.ffn.key.weight: stored_bits 108032 -> 524288",
        "blocks.1.ffn.key.weight: reason sq: policy sq treats all matrices alike -> by hand",
    ]


def test_options_that_plans_once_lacked_mean_what_was_done_then() -> None:
    before = {"guide": 0.5, "row_weights": True, "damping": 0.01, "sweeps": 1}
    assert checked_options("table", before) == before | {"output_feedback": False}
    assert checked_options("table", before | {"output_feedback": True})["output_feedback"] is True
    with pytest.raises(PlanError, match="options of method trellis are"):
        checked_options("trellis", before | {"output_feedback": False})
