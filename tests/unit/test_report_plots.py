"""The pictures of the report: positions, colours, order."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from rwkvq.report.data import ProxyPlane, ProxyRow, StageTime
from rwkvq.report.plots import (
    Axis,
    axis_around,
    heat_map,
    heat_rows,
    part_bar,
    plane_key,
    proxy_plane,
    stage_bars,
    tick_text,
)
from rwkvq.report.tables import parts
from tests.made_up_report import report

PLANE = ProxyPlane(
    rows=(
        ProxyRow("a.weight", 0, "matrix", 100, 1.0, 10.0, "sq"),
        ProxyRow("b.weight", 0, "matrix", 300, 4.0, 1000.0, "vq"),
        ProxyRow("c.w1", 0, "lora", 100, 3.0, 100.0, "vq"),
        ProxyRow("k_a", 0, "elementwise", 8, 0.0, 0.0, None),
    ),
    gap_mode="quantile",
    decision="fixed",
    tau_c=2.0,
    tau_f=50.0,
)


def _svg(plane: ProxyPlane) -> ElementTree.Element:
    return ElementTree.fromstring(proxy_plane(plane))[0]


def _percent(text: str | None) -> float:
    assert text is not None and text.endswith("%")
    return float(text[:-1])


def test_an_axis_is_logarithmic() -> None:
    axis = Axis(1.0, 100.0)
    assert [axis.at(value) for value in (1.0, 10.0, 100.0)] == pytest.approx([0.0, 50.0, 100.0])


@pytest.mark.parametrize(
    ("low", "high"), [(1.2, 1.6), (0.9, 3.4), (4.0, 500.0), (1.0, 4e10), (0.03, 0.9), (1e-5, 1e-4)]
)
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = Axis(low, high).ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    assert len({tick_text(tick) for tick in ticks}) == len(ticks)


def test_an_axis_around_one_value_or_nothing_is_usable() -> None:
    for axis in (axis_around([3.0]), axis_around([]), axis_around([0.0, float("inf")])):
        assert 0 < axis.low < axis.high


def test_tick_text_is_short() -> None:
    assert [tick_text(value) for value in (0.5, 20, 1e4, 3e6, 1e10, 1e-5)] == ["0.5", "20", "10k", "3M", "1e10", "1e-5"]
    assert [tick_text(value) for value in (1.2e-4, 1.4e-4, 2.5e10)] == ["1.2e-4", "1.4e-4", "2.5e10"]


def test_marks_lie_on_their_side_of_the_thresholds() -> None:
    svg = _svg(PLANE)
    tau_c, tau_f = (line for line in svg.iter("line") if line.get("class") == "tau")
    marks = {mark[0].text.split(":")[0]: mark for mark in svg.iter("use") if mark[0].text}
    assert set(marks) == {"a.weight", "b.weight", "c.w1"}
    assert _percent(marks["a.weight"].get("x")) < _percent(tau_c.get("x1")) < _percent(marks["b.weight"].get("x"))
    # the page's y axis points down: a smaller P_f has the larger y
    assert _percent(marks["a.weight"].get("y")) > _percent(tau_f.get("y1")) > _percent(marks["b.weight"].get("y"))


def test_arm_and_class_are_visible_without_colour() -> None:
    marks = {mark[0].text.split(":")[0]: mark for mark in _svg(PLANE).iter("use") if mark[0].text}
    assert marks["a.weight"].get("href") != marks["b.weight"].get("href")
    assert marks["c.w1"].get("class") == "mark vq hollow"


def test_the_key_counts_matrices_and_weights_and_what_is_not_shown() -> None:
    key = plane_key(PLANE)
    assert "1 of 3 matrices, 20.0 % of their weights" in key
    assert "2 of 3 matrices, 80.0 % of their weights" in key
    assert "1 with a proxy of 0 not shown" in key


def test_a_plane_without_thresholds_has_no_lines() -> None:
    picture = proxy_plane(replace(PLANE, tau_c=None, tau_f=None))
    assert 'class="tau"' not in picture and 'class="region"' not in picture


def test_heat_rows_follow_the_fullest_block_matrices_first() -> None:
    names = heat_rows(report().tensors)
    assert names[:4] == ["att.receptance", "att.key", "att.value", "att.output"]
    assert names[4:6] == ["ffn.key", "ffn.value"]
    # block 0 has no v1 and v2; they keep their place between a2 and g1
    assert names[6:] == ["att.w1", "att.w2", "att.a1", "att.a2", "att.v1", "att.v2", "att.g1", "att.g2"]


def test_a_heat_map_has_a_cell_for_every_tensor_and_block() -> None:
    picture = heat_map(report(), "error")
    body = picture[picture.index("<tbody>") : picture.index("</tbody>")]
    assert body.count("<td") == 14 * 6
    assert body.count('class="no"') == 2
    shades = {int(shade) for shade in re.findall(r'class="h(\d)"', body)}
    assert {0, 8} <= shades


def test_scalar_cells_are_marked_only_in_a_mix() -> None:
    data = report()
    assert " edge" in heat_map(data, "bits")
    assert " edge" not in heat_map(data, "error")
    only = tuple(replace(row, format="scalar") if row.method != "keep" else row for row in data.tensors)
    assert " edge" not in heat_map(replace(data, tensors=only), "bits")


def test_equal_values_have_one_colour_and_one_legend_entry() -> None:
    data = report()
    equal = tuple(replace(row, stored_bits=3 * row.numel) for row in data.tensors)
    picture = heat_map(replace(data, tensors=equal), "bits")
    assert set(re.findall(r'<td class="(h\d)', picture)) == {"h4"}
    assert "all 3.000" in picture


def test_deep_models_move_figures_into_tooltips() -> None:
    picture = heat_map(report(layers=20, width=64), "bits")
    assert 'title="blocks.19.att.key.weight 3.50"' in picture


def test_a_map_of_nothing_says_so() -> None:
    data = report()
    kept = tuple(row for row in data.tensors if row.method == "keep")
    assert "No quantized tensor" in heat_map(replace(data, tensors=kept), "bits")


def test_the_slowest_stage_has_the_longest_bar() -> None:
    bars = stage_bars([StageTime("plan", 1.0), StageTime("quantize", 4.0), StageTime("pack", 0.0, reused=True)])
    assert re.findall(r"width:([\d.]+)%", bars) == ["25.0", "100.0", "0.0"]
    assert "<b>reused</b>" in bars
    assert "width:0.0%" in stage_bars([StageTime("plan", 0.0)])


def test_the_stacked_bar_has_the_shares_of_the_parts() -> None:
    found = parts(report())
    grown = [float(text) for text in re.findall(r"flex-grow:([\d.]+)", part_bar(found))]
    everything = sum(part.stored_bits for part in found)
    assert grown == pytest.approx([1000 * part.stored_bits / everything for part in found], abs=0.05)
