"""The pictures of the family page: where points lie, what colours compare, which bars are shared."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from rwkvq.report.data import Estimate, StageTime
from rwkvq.report.family import CellData, FamilyData
from rwkvq.report.family.data import shared_stages
from rwkvq.report.family.maps import cell_map, common_ends, deep_map, median_error, plane_of
from rwkvq.report.family.provenance import fact_groups
from rwkvq.report.family.size_plot import HEIGHT, few_ticks, size_panels
from rwkvq.report.family.times import time_bars
from rwkvq.report.plots import Axis
from tests.made_up_family import MODELS, cell, cell_report, family


@pytest.fixture(scope="module")
def data() -> FamilyData:
    return family()


def spot(model: str, policy: str, file_bytes: int, kl: float, error: float | None = 0.001) -> CellData:
    item = cell(model, policy, 2, 64)
    assert item.report is not None
    sizes = replace(item.report.sizes, file_bytes=file_bytes, file_bits=8 * file_bytes / item.report.sizes.weights)
    reference, ours = item.report.quality
    quality = (reference, replace(ours, kl=Estimate(kl, error)))
    return replace(item, report=replace(item.report, sizes=sizes, quality=quality))


def marks(cells: tuple[CellData, ...]) -> dict[str, ElementTree.Element]:
    """The nested pictures of the points by the name of their cell."""
    root = ElementTree.fromstring(size_panels(FamilyData("f", cells, {})))
    found = [item for item in root.iter("svg") if (item.get("class") or "").startswith("spot")]
    return {(item[0].text or "").split(":")[0]: item for item in found}


def test_smaller_files_lie_left_and_larger_losses_high() -> None:
    found = marks((spot("m", "a", 1_000_000, 0.05), spot("m", "b", 1_100_000, 0.1)))
    x = {name: float((item.get("x") or "").removesuffix("%")) for name, item in found.items()}
    y = {name: float(item.get("y") or "") for name, item in found.items()}
    assert 0 < x["m a"] < x["m b"] < 100
    assert HEIGHT > y["m a"] > y["m b"] > 0


def test_equal_distances_are_equal_ratios_in_all_panels() -> None:
    found = marks(
        (
            spot("m", "a", 1_000_000, 0.05),
            spot("m", "b", 1_100_000, 0.1),
            spot("n", "a", 40_000_000, 0.03),
            spot("n", "b", 44_000_000, 0.06),
        )
    )
    x = [float((item.get("x") or "").removesuffix("%")) for item in found.values()]
    y = [float(item.get("y") or "") for item in found.values()]
    assert abs(x[1] - x[0]) == pytest.approx(abs(x[3] - x[2]), abs=0.02)
    assert abs(y[1] - y[0]) == pytest.approx(abs(y[3] - y[2]), abs=0.2)


def test_the_front_holds_what_nothing_else_beats_in_both() -> None:
    found = marks(
        (
            spot("m", "small", 1_000_000, 0.1),
            spot("m", "close", 1_200_000, 0.05),
            spot("m", "beaten", 1_250_000, 0.09),
            spot("n", "alone", 9_000_000, 0.2),
        )
    )
    front = {name for name, item in found.items() if item.get("class") == "spot front"}
    assert front == {"m small", "m close", "n alone"}


def test_tooltips_name_bytes_and_bits() -> None:
    (title,) = (item[0].text for item in marks((spot("m", "a", 1_000_000, 0.05),)).values())
    assert title is not None
    for part in ("m a: KL 0.0500 ± 0.0010", "1.00 MB", "file bits", "3.297 matrix bits"):
        assert part in title


def test_error_bars_are_drawn_where_the_error_is_known() -> None:
    cells = (
        spot("m", "a", 1_000_000, 0.05),
        spot("m", "b", 1_100_000, 0.1, None),
        spot("m", "c", 1_200_000, 0.02, 0.5),
    )
    kinds = {name: {child.get("class") for child in item} for name, item in marks(cells).items()}
    assert "whisker" in kinds["m a"]
    assert "whisker" not in kinds["m b"]
    # an error as large as the value reaches below zero, which a logarithmic axis has not
    assert "whisker" not in kinds["m c"]


def test_the_two_size_scales_agree() -> None:
    page = size_panels(FamilyData("f", (spot("m", "a", 1_000_000, 0.05), spot("m", "b", 1_300_000, 0.1)), {}))
    weights = cell_report("m", "a", 2, 64).sizes.weights
    below = {text: float(x) for x, text in re.findall(r'x="([\d.]+)%" y="100%" dy="17"[^>]*>([^<]+)', page)}
    above = {text: float(x) for x, text in re.findall(r'x="([\d.]+)%" y="-9"[^>]*>([^<]+)', page)}
    assert len(below) >= 2 and len(above) >= 2
    # both are logarithmic: the same slope, shifted by the bits of a megabyte
    pairs = [(float(text), x) for text, x in below.items()] + [
        (float(text) * weights / 8e6, x) for text, x in above.items()
    ]
    pairs.sort()
    assert [x for _, x in pairs] == sorted(x for _, x in pairs)


def test_ticks_fit_a_narrow_picture() -> None:
    for low, high in ((10.3, 10.9), (1.0, 4.0), (0.4, 900.0), (8.7, 9.3)):
        assert 2 <= len(few_ticks(Axis(low, high))) <= 5


def test_unequal_names_of_twelve_policies_are_all_written() -> None:
    run = family(MODELS, tuple(f"policy-{at}" for at in range(12)))
    page = size_panels(run)
    assert "Without a name" not in page
    assert len(re.findall(r">policy-\d+</text>", page)) == page.count("<circle") == 36


def test_colours_compare_across_the_policies_of_a_model(data: FamilyData) -> None:
    cells = data.cells_of("rwkv7-9m")
    ends = common_ends(cells, "error")
    assert ends is not None
    low, high = ends
    for item in cells:
        assert item.report is not None
        errors = [row.relative_error for row in item.report.tensors if row.relative_error is not None]
        assert low <= min(errors) and max(errors) <= high
    report = cells[1].report
    assert report is not None
    shared, own = cell_map(report, "error", ends), cell_map(report, "error", None)
    assert "h8" in own and shared != own


def test_deep_models_get_strips_and_shallow_ones_figures() -> None:
    shallow, deep = cell_report("m", "sq", 6, 64), cell_report("m", "sq", 20, 64)
    assert "<svg" not in cell_map(shallow, "bits", (3.0, 4.0))
    assert "<svg" in cell_map(deep, "bits", (3.0, 4.0))


def _lengths(picture: str, name: str, kind: str) -> int:
    """Blocks that the strips of one tensor cover in one kind of path."""
    row = picture[picture.index(f'<th scope="row">{name}<') :].split("<tr>")[0]
    paths = re.findall(rf'<path class="{kind}\d" d="([^"]+)"', row)
    return sum(int(length) for path in paths for length in re.findall(r"h(\d+)", path)) // 13


def test_strips_cover_every_block_once_and_mark_what_is_missing() -> None:
    report = cell_report("m", "rwkvquant", 20, 64)
    picture = deep_map(report, "bits", (3.0, 4.0))
    assert _lengths(picture, "att.key", "s") == 20
    assert (_lengths(picture, "att.v1", "s"), _lengths(picture, "att.v1", "m")) == (19, 1)
    scalar = [row for row in report.tensors if row.short == "att.w2" and row.format == "scalar"]
    assert _lengths(picture, "att.w2", "x") == len(scalar) == 20


def test_strips_are_shaded_by_value() -> None:
    report = cell_report("m", "sq", 20, 64)
    first = next(row for row in report.tensors if row.name == "blocks.0.att.key.weight")
    tensors = tuple(replace(row, stored_bits=4 * row.numel) if row is first else row for row in report.tensors)
    picture = deep_map(replace(report, tensors=tensors), "bits", (3.0, 4.0))
    assert '<path class="s8" d="M0 8h13"/>' in picture
    assert "<title>att.key: 3.297 to 4.000</title>" in picture


def test_the_median_error_is_of_quantized_tensors() -> None:
    report = cell_report("m", "sq", 2, 64)
    kept = tuple(row for row in report.tensors if row.method == "keep")
    assert median_error(replace(report, tensors=kept)) is None
    known = sorted(row.relative_error for row in report.tensors if row.relative_error is not None)
    assert known[0] < (median_error(report) or 0) < known[-1]


def test_the_plane_shows_the_arms_of_the_policy_that_decides_by_it(data: FamilyData) -> None:
    cells = data.cells_of("rwkv7-9m")
    found = plane_of(cells)
    assert found is not None
    plane, deciding = found
    assert [item.policy for item in deciding] == ["rwkvquant"]
    assert {row.arm for row in plane.rows} == {"sq", "vq", None}
    found = plane_of(cells[:2])
    assert found is not None
    assert found[1] == [] and {row.arm for row in found[0].rows} == {None}
    assert plane_of(()) is None


def test_shared_stages_count_once_with_the_time_of_the_cell_that_did_them(data: FamilyData) -> None:
    first, second, *_ = data.cells_of("rwkv7-9m")
    assert second.report is not None
    reused = tuple(
        StageTime(stage.name, 0.1 if stage.name in ("windows", "proxies") else stage.seconds)
        for stage in second.report.stages
    )
    second = replace(second, report=replace(second.report, stages=reused))
    shared = {stage.name: stage.seconds for stage in shared_stages((second, first))}
    assert shared == {
        "windows": 1.4,
        "activations": pytest.approx(19.66, abs=0.1),
        "proxies": pytest.approx(6.39, abs=0.1),
    }
    assert not set(shared) & {stage.name for stage in first.stages}


def test_bars_are_to_scale_within_a_model() -> None:
    item = cell("m", "sq", 2, 64)
    assert item.report is not None
    stages = (StageTime("windows", 1.0), StageTime("quantize", 3.0), StageTime("evaluate", 1.0), StageTime("odd", 0.0))
    bars = time_bars(FamilyData("f", (replace(item, report=replace(item.report, stages=stages)),), {}))
    assert re.findall(r'class="(stage-\w+)" style="width:([\d.]+)%"', bars) == [
        ("stage-windows", "25.00"),
        ("stage-quantize", "75.00"),
        ("stage-evaluate", "25.00"),
    ]
    assert "<span>shared</span>" in bars and "<b>4.0 s</b>" in bars


def test_unknown_stages_and_times_that_are_no_times_do_no_harm() -> None:
    item = cell("m", "sq", 2, 64)
    assert item.report is not None
    stages = (StageTime("<odd>", 2.0), StageTime("quantize", float("nan")), StageTime("pack", float("inf")))
    bars = time_bars(FamilyData("f", (replace(item, report=replace(item.report, stages=stages)),), {}))
    assert "stage-other" in bars and "nan" not in bars and "inf" not in bars and "<odd>" not in bars


def test_provenance_is_said_once_where_it_is_shared(data: FamilyData) -> None:
    groups = {group.title: dict(group.facts) for group in fact_groups(data)}
    assert groups["this run"]["family"] == "demo.yaml"
    assert groups["all cells"]["libraries.torch"] == "2.13.0+cpu"
    assert groups["rwkv7-9m"] == {"checkpoint.path": "rwkv7-9m.pth"}
    assert groups["rwkv7-9m rtn"] == {"plan.policy": "rtn"}
    assert set(groups) == {"this run", "all cells", *data.models, *(item.name for item in data.cells)}
