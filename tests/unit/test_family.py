"""Family files: what they expand to, what cells share, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rwkvq.errors import SettingsError
from rwkvq.family.family import Family, load_family, merged

DEMO = Path(__file__).parents[2] / "families" / "demo.yaml"
MINIMAL: dict[str, Any] = {
    "family": "f",
    "out": "results",
    "settings": {"windows": {"source": "text.txt", "tokenizer": "t.json"}, "run": {"workers": 3}},
    "models": {"small": {"model": "small.pth"}, "large": {"model": "large.pth"}},
    "policies": {"rtn": {"plan": {"policy": "rtn"}}, "sq": {"plan": {"policy": "sq"}}},
}


def family_of(folder: Path, *overrides: str, **changes: Any) -> Family:
    """The family of MINIMAL with changes of its top level."""
    path = folder / "family.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return load_family(path, overrides)


def test_cells_are_models_times_policies_in_the_order_of_the_file(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    # safe_dump sorts the names of the file
    assert [cell.name for cell in family.cells] == ["large rtn", "large sq", "small rtn", "small sq"]
    cell = family.cell("small", "sq")
    assert cell.settings.model == "small.pth"
    assert cell.settings.plan.policy == "sq"
    assert cell.settings.windows.source == "text.txt"
    assert cell.settings.run.workers == 3
    assert (cell.settings.run_dir, cell.settings.shared_dir) == ("results/small/sq", "results/shared/small")


def test_later_parts_win_and_sections_are_merged() -> None:
    assert merged({"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "b": {"z": 1}}) == {
        "a": {"x": 1, "y": 3},
        "b": {"z": 1},
    }


def test_overrides_change_every_cell_last(tmp_path: Path) -> None:
    family = family_of(tmp_path, "quantize.bits=4", "windows.samples=7")
    assert {(cell.settings.quantize.bits, cell.settings.windows.samples) for cell in family.cells} == {(4, 7)}


def test_variants_are_a_third_axis(tmp_path: Path) -> None:
    family = family_of(tmp_path, variants={"b3": {"quantize": {"bits": 3}}, "b4": {"quantize": {"bits": 4}}})
    assert len(family.cells) == 8
    cell = family.cell("small", "sq b4")
    assert cell.name == "small sq b4"
    assert cell.settings.quantize.bits == 4
    assert cell.settings.run_dir == "results/small/sq-b4"


def test_excluded_cells_are_left_out(tmp_path: Path) -> None:
    family = family_of(tmp_path, exclude=["large sq"])
    assert [cell.name for cell in family.cells] == ["large rtn", "small rtn", "small sq"]


def test_cells_share_what_does_not_differ_between_them(tmp_path: Path) -> None:
    longer = {"plan": {"policy": "sq"}, "windows": {"samples": 99}}
    family = family_of(tmp_path, policies={"rtn": None, "sq": {"plan": {"policy": "sq"}}, "long": longer})
    groups = family.groups()
    of_small = {folder: [cell.policy for cell in cells] for folder, cells in groups.items() if "small" in folder}
    assert sorted(of_small.values()) == [["long"], ["rtn", "sq"]]
    assert all(folder.startswith("results/shared/small-") for folder in of_small)


def test_the_demo_has_two_models_under_three_policies() -> None:
    family = load_family(DEMO)
    assert len(family.cells) == 6
    assert {cell.settings.evaluate.baselines for cell in family.cells} == {()}
    assert family.file.schedule is not None and family.file.schedule.paused


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no models": ({"models": {}}, "models: empty"),
    "no policies": ({"policies": {}}, "policies: empty"),
    "unknown key": ({"polices": {}}, "polices: unknown key; known: family, out"),
    "unknown setting": ({"settings": {"windows": {"sample": 3}}}, "windows.sample: unknown key; known: source"),
    "wrong type": ({"settings": {"quantize": {"bits": "three"}}}, "quantize.bits"),
    "bad name": ({"models": {"../up": {"model": "a.pth"}}}, "models.../up"),
    "name of the shared folder": ({"models": {"shared": {"model": "a.pth"}}}, "choose another"),
    "own run folder": ({"settings": {"run_dir": "x"}}, "run_dir: is decided by the family"),
    "own shared folder": ({"policies": {"p": {"shared_dir": "x"}}}, "shared_dir: is decided by the family"),
    "workers of one model": ({"models": {"m": {"run": {"workers": 1}}}}, "run: belongs under settings"),
    "too many cells": ({"models": {f"m{n}": None for n in range(600)}}, "at most 1000; split"),
    "unknown cell excluded": ({"exclude": ["small vq"]}, "exclude: no cell 'small vq'; cells: large rtn"),
    "all cells excluded": (
        {"exclude": ["small rtn", "small sq", "large rtn", "large sq"]},
        "exclude: leaves no cell",
    ),
    "models as a list": ({"models": ["a.pth"]}, "models: Input should be a valid dictionary"),
    "unknown schedule": ({"schedule": {"crone": "* * * * *"}}, "schedule.crone: unknown key; known: cron"),
    "unknown policy": ({"policies": {"p": {"plan": {"policy": "best"}}}}, "plan.policy"),
    "unknown notify": ({"notify": "sometimes"}, "notify"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_that_names_place_and_remedy(tmp_path: Path, kind: str) -> None:
    changes, words = BAD[kind]
    with pytest.raises(SettingsError) as caught:
        family_of(tmp_path, **changes)
    line = str(caught.value)
    assert str(tmp_path / "family.yaml") in line
    assert words in line
    assert "\n" not in line and len(line) < 2000


def test_an_override_of_the_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="run_dir: is decided by the family"):
        family_of(tmp_path, "run_dir=elsewhere")


def test_a_missing_cell_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no cell 'small' 'vq'; cells: large rtn, large sq"):
        family_of(tmp_path).cell("small", "vq")
