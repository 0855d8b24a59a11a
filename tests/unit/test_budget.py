"""Policy budget: targets in bits and in bytes, the table of curves, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rwkvq.artifact.layout import FORMAT, entries_of
from rwkvq.checkpoint.names import OUTER, Weight, weights_of
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.checkpoint.writer import safetensors_header
from rwkvq.errors import PlanError, SettingsError
from rwkvq.formats import ScalarLayout
from rwkvq.plan.bits import totals
from rwkvq.plan.candidates import CurvePoint, candidates_of, read_curves, write_curves
from rwkvq.plan.outer import WIDTHS, outer_candidates
from rwkvq.plan.plan import Plan
from rwkvq.plan.policies import Curves, make_plan
from rwkvq.plan.size import size_in_bytes
from rwkvq.settings import CurvesSettings, PlanSettings, QuantizeSettings, Settings, parse
from tests.packed import tiny_source
from tests.unit.test_gradients import linear_weights

STATE_BITS = 10


@pytest.fixture(scope="module", params=["x060", "x070"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_source(tmp_path_factory.mktemp("model"), request.param, width=256, ffn=512)


def made_up_curves(source: Checkpoint) -> list[CurvePoint]:
    """Every other weight matters a hundred times as much."""
    points = []
    for block in range(source.spec.layers):
        for turn, weight in enumerate(linear_weights(source, block)):
            for item in candidates_of(weight, STATE_BITS):
                bits, numel = item.layout.stored_bits(), weight.shape[0] * weight.shape[1]
                loss = (100.0 if turn % 2 else 1.0) * numel * 4.0 ** (-bits / numel)
                points.append(CurvePoint(weight.name, item.label, bits, loss))
    return points + outer_curves(source, 1.0)


def outer_curves(source: Checkpoint, factor: float) -> list[CurvePoint]:
    """Of embedding and head, whose weights matter `factor` times as much as the least."""
    shapes = {name: source.shape(name) for name in source.names()}
    points = []
    for weight in weights_of(source.spec, shapes):
        if weight.tensor in OUTER:
            for item in outer_candidates(weight, source.dtype(weight.tensor)):
                bits, numel = item.layout.stored_bits(), weight.shape[0] * weight.shape[1]
                loss = 0.0 if item.method == "keep" else factor * numel * 4.0 ** (-bits / numel)
                points.append(CurvePoint(weight.name, item.label, bits, loss))
    return points


def plan_for(source: Checkpoint, points: list[CurvePoint], **plan: object) -> Plan:
    settings = PlanSettings.model_validate({"policy": "budget", **plan})
    curves = Curves(points, CurvesSettings(state_bits=STATE_BITS, guide=0.25))
    return make_plan(source, [], settings, QuantizeSettings(damping=0.02), 0, curves)


@pytest.mark.parametrize("bpw", [2.3, 3.0, 3.275, 4.5])
def test_the_bits_are_those_asked_for_and_no_more(source: Checkpoint, bpw: float) -> None:
    plan = plan_for(source, made_up_curves(source), bpw=bpw)
    bits = totals(plan).matrix_bits
    assert bits is not None and bpw - 0.02 < bits <= bpw
    assert plan.decision["bpw"] == bpw and float(plan.decision["predicted_kl"]) > 0
    assert Plan.from_json(plan.to_json()) == plan


def test_weights_that_matter_get_more_bits(source: Checkpoint) -> None:
    plan = plan_for(source, made_up_curves(source), bpw=3.275)
    rates: dict[bool, list[float]] = {True: [], False: []}
    for block in range(source.spec.layers):
        matters = {item.name: bool(turn % 2) for turn, item in enumerate(linear_weights(source, block))}
        for entry in plan.tensors:
            if entry.name in matters:
                assert entry.layout.format in ("trellis", "table") and entry.method == entry.layout.format
                sweeps = {"sweeps": 1} if entry.method == "trellis" else {}
                assert entry.options == {"guide": 0.25, "row_weights": True, "damping": 0.02} | sweeps
                assert "predicted KL" in entry.reason
                rates[matters[entry.name]].append(entry.layout.nominal_bits())
    assert min(rates[True]) > max(rates[False])


def file_bytes(plan: Plan) -> int:
    """Bytes of the weight file that would be written."""
    entries = [entry for tensor in plan.tensors for entry in entries_of(tensor)]
    header, _ = safetensors_header(entries, {"format": FORMAT})
    return len(header) + totals(plan).total_stored_bits // 8


def test_a_size_is_that_of_the_whole_file(source: Checkpoint) -> None:
    points = made_up_curves(source)
    for size in ("600kB", "700kB", "800 KiB"):
        plan = plan_for(source, points, size=size)
        predicted, real = int(plan.decision["predicted_bytes"]), file_bytes(plan)
        assert real <= predicted < 1.005 * real
        assert 0.98 * size_in_bytes(size) < predicted <= size_in_bytes(size)
        assert plan.decision["size"] == size


def test_a_size_decides_embedding_and_head_with_all_the_rest(source: Checkpoint) -> None:
    points = [point for point in made_up_curves(source) if point.name not in OUTER]

    def widths(factor: float, **plan: object) -> list[int]:
        made = plan_for(source, points + outer_curves(source, factor), **plan)
        entries = {entry.name: entry for entry in made.tensors}
        return [
            entry.layout.bits if isinstance(entry.layout, ScalarLayout) else 16
            for entry in (entries[name] for name in OUTER)
        ]

    assert widths(0.01, size="600kB") == [4, 4]
    assert widths(1e6, size="1.0MB") == [16, 16]
    assert set(widths(10.0, size="700kB")) <= set(WIDTHS)
    assert widths(0.01, size="700kB", head_bits=6) == [4, 6]
    assert widths(0.01, bpw=3.0) == [16, 16]
    assert widths(0.01, bpw=3.0, emb_bits=5) == [5, 16]


def test_the_head_is_rounded_with_feedback_and_the_embedding_to_the_nearest(source: Checkpoint) -> None:
    plan = plan_for(source, made_up_curves(source), bpw=3.0, emb_bits=4, head_bits=8)
    emb, head = ({entry.name: entry for entry in plan.tensors}[name] for name in OUTER)
    assert (emb.method, emb.options) == ("rtn", {"clip_search": True})
    assert emb.layout == ScalarLayout(320, 256, 4, 64, True) and emb.reason == "plan.emb_bits is 4"
    assert head.method == "gptq" and head.layout == ScalarLayout(320, 256, 8, 256, True)
    fixed = {"clip_search": False, "static_groups": False, "act_order": False}
    assert head.options == fixed | {"sweeps": 1, "damping": 0.02}
    without_gradients = make_plan(source, [], PlanSettings(policy="sq", head_bits=5), QuantizeSettings(), 0)
    assert without_gradients.tensors[-1].method == "rtn"


def test_targets_out_of_reach_name_the_floor(source: Checkpoint) -> None:
    points = made_up_curves(source)
    with pytest.raises(PlanError, match=r"plan\.size 1kB cannot be met: .* takes [\d,]+ bytes; choose") as error:
        plan_for(source, points, size="1kB")
    (floor,) = re.findall(r"takes ([\d,]+) bytes", str(error.value))
    smallest = int(floor.replace(",", ""))
    assert plan_for(source, points, size=f"{smallest}B").decision["predicted_bytes"] == smallest
    with pytest.raises(PlanError, match=f"takes {floor} bytes"):
        plan_for(source, points, size=f"{smallest - 1}B")
    dear = [point for point in points if point.candidate.startswith("trellis-3")]
    with pytest.raises(PlanError, match=r"plan\.bpw 2 cannot be met: at least 3\.\d+ bits .* choose a larger target"):
        plan_for(source, dear, bpw=2.0)


@pytest.mark.parametrize("text", ["", "3", "GB", "-1GB", "1.2 gb", "1e9B", "1GB2", "nanB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(SettingsError, match="expected a number and one of"):
        size_in_bytes(text)


def test_sizes() -> None:
    sizes = {"1.2GB": 1_200_000_000, "800 MB": 800_000_000, "1.5GiB": 3 << 29, "7B": 7, " 2kB ": 2000}
    assert {text: size_in_bytes(text) for text in sizes} == sizes


def test_two_targets_are_refused() -> None:
    with pytest.raises(SettingsError, match="set one"):
        parse({"plan": {"bpw": 3.0, "size": "1GB"}}, "test")
    assert Settings().plan.bpw is None


def test_curves_of_another_model_are_refused(source: Checkpoint) -> None:
    points = [point for point in made_up_curves(source) if point.name not in OUTER]
    with pytest.raises(PlanError, match=r"emb\.weight: .* run the stage `curves` again"):
        plan_for(source, points, size="700kB")
    without = [point for point in points if point.name != points[0].name]
    for wrong in (without, [*points[:-1], CurvePoint(points[-1].name, points[-1].candidate, 1, 1.0)], []):
        with pytest.raises(PlanError, match="run the stage `curves` again"):
            plan_for(source, wrong, bpw=3.0)
    with pytest.raises(PlanError, match="run the stage `curves` first"):
        make_plan(source, [], PlanSettings(policy="budget"), QuantizeSettings(), 0)


def test_lora_may_be_kept_out_of_the_budget(source: Checkpoint) -> None:
    plan = plan_for(source, made_up_curves(source), bpw=3.0, lora="fp16")
    matrices = [entry for entry in plan.tensors if entry.method == "trellis"]
    assert {entry.weight_class for entry in matrices} == {"matrix"}
    assert sum(entry.stored_bits for entry in matrices) <= 3.0 * sum(entry.numel for entry in matrices)


def test_a_weight_that_nothing_fits_is_named() -> None:
    weight = Weight("blocks.0.att.w1", "blocks.0.att.w1", None, "lora", True, (3, 40), 0, "xw")
    with pytest.raises(PlanError, match=r"att\.w1: no format of policy budget fits it"):
        candidates_of(weight, 12)


def test_short_sides_have_the_rates_that_fill_bytes() -> None:
    weight = Weight("blocks.0.att.w1", "blocks.0.att.w1", None, "lora", True, (48, 64), 0, "xw")
    trellis = [item.label for item in candidates_of(weight, 12) if item.layout.format == "trellis"]
    offsets = [f"-r{bits}-c0" for bits in (0, 3, 4)]  # 16 rows do not fill whole bytes at every rate
    assert trellis == [
        f"trellis-{rate}{end}" for rate in ("1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5") for end in offsets
    ]


def test_the_fast_formats_decode_at_the_speed_of_memory(source: Checkpoint) -> None:
    plan = plan_for(source, made_up_curves(source), bpw=3.5, formats="speed")
    assert {entry.layout.format for entry in plan.tensors if entry.method != "keep"} == {"table"}
    assert plan.decision["formats"] == "speed"


def test_the_table_survives_and_damage_is_named(tmp_path: Path, source: Checkpoint) -> None:
    path, points = tmp_path / "curves.parquet", made_up_curves(source)
    write_curves(path, points, {"model_sha256": source.identity()})
    assert read_curves(path) == points
    before = path.read_bytes()
    write_curves(path, points, {"model_sha256": source.identity()})
    assert path.read_bytes() == before
    with pytest.raises(PlanError, match="run the stage `curves` first"):
        read_curves(tmp_path / "none.parquet")
    path.write_bytes(before[:100])
    with pytest.raises(PlanError, match=r"curves\.parquet: no table of curves .* again"):
        read_curves(path)
    pq.write_table(pa.table({"name": ["a"]}), path)
    with pytest.raises(PlanError, match="other columns"):
        read_curves(path)
    write_curves(path, [CurvePoint("a", "b", 1, float("nan"))], {})
    with pytest.raises(PlanError, match="has loss nan"):
        read_curves(path)


def rates_by(plan: Plan, role: str) -> set[tuple[str, float]]:
    """Format and rate of the weights whose name ends with `role`."""
    found = [entry.layout for entry in plan.tensors if entry.name.endswith(role)]
    assert found
    return {(layout.format, layout.nominal_bits()) for layout in found}


def test_products_that_do_not_wait_for_each_other_get_one_format(source: Checkpoint) -> None:
    points = made_up_curves(source)
    free = plan_for(source, points, bpw=3.275)
    plan = plan_for(source, points, bpw=3.275, launch_groups="block")
    projections = ["att.receptance.weight", "att.key.weight", "att.value.weight"]
    projections += ["att.gate.weight"] if source.spec.version == "x060" else []
    for block in range(source.spec.layers):
        assert len({rate for name in projections for rate in rates_by(plan, f"blocks.{block}.{name}")}) == 1
        if source.spec.version == "x060":
            slices = {rate for part in "wkvrg" for rate in rates_by(plan, f"blocks.{block}.att.time_maa_w2.{part}")}
            assert len(slices) == 1
        else:
            assert rates_by(plan, f"blocks.{block}.att.w1") == rates_by(plan, f"blocks.{block}.att.a1")
    assert len({rate for name in projections for rate in rates_by(free, name)}) > 1  # the curves ask for several
    bits = totals(plan).matrix_bits
    assert bits is not None and 3.2 < bits <= 3.275
    predicted, without = (float(plan.decision[f"predicted_kl{end}"]) for end in ("", "_without_groups"))
    assert plan.decision["launch_groups"] == "block" and "launch_groups" not in free.decision
    assert without == free.decision["predicted_kl"] and predicted > 1.01 * without
    reasons = {entry.name: entry.reason for entry in plan.tensors}
    assert reasons["blocks.0.att.key.weight"].endswith(f"one format with {len(projections) - 1} others")
    assert "one format" not in reasons["blocks.0.att.output.weight"]


def test_a_role_gets_one_format_in_all_blocks(source: Checkpoint) -> None:
    points = [
        CurvePoint(item.name, item.candidate, item.stored_bits, item.loss * (50.0 if "blocks.1." in item.name else 1.0))
        for item in made_up_curves(source)
    ]
    roles = ("att.key.weight", "att.value.weight", "att.output.weight", "ffn.key.weight", "ffn.value.weight")
    free, plan = (plan_for(source, points, bpw=3.0, launch_groups=kind) for kind in ("none", "role"))
    assert all(len(rates_by(free, role)) > 1 for role in roles)
    assert all(len(rates_by(plan, role)) == 1 for role in roles)
    assert float(plan.decision["predicted_kl"]) > float(plan.decision["predicted_kl_without_groups"])


def test_a_group_without_a_common_format_is_refused(source: Checkpoint) -> None:
    first = "blocks.0.att.receptance.weight"
    points = [point for point in made_up_curves(source) if (point.name == first) == point.candidate.startswith("table")]
    with pytest.raises(PlanError, match=r"receptance.weight: no format fits it and the [23] weights of its launch gro"):
        plan_for(source, points, bpw=3.275, launch_groups="block")
