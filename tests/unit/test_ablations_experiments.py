"""The experiments: every one is complete, every line has valid settings, a study chooses of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkvq.ablations.experiments import EXPERIMENTS
from rwkvq.ablations.lines import LINES
from rwkvq.ablations.study import load_study, write_texts
from rwkvq.ablations.table import CASES, EXTRA_ROWS
from rwkvq.errors import SettingsError
from tests.small_study import tiny_study, write_study


def test_every_experiment_but_those_out_of_scope_is_there() -> None:
    assert set(EXPERIMENTS) == {f"E{index}" for index in range(1, 21)} - {"E15", "E19"}


def test_an_experiment_has_lines_and_rows_or_uses_those_of_another() -> None:
    for key, experiment in EXPERIMENTS.items():
        assert set(experiment.lines) <= set(LINES), key
        assert bool(experiment.lines) == (key in CASES or key in EXTRA_ROWS), key
        assert experiment.lines or experiment.uses, key
        assert set(experiment.uses) <= set(EXPERIMENTS), key


def test_every_line_is_needed_and_has_valid_settings(tmp_path: Path) -> None:
    assert {line for experiment in EXPERIMENTS.values() for line in experiment.lines} == set(LINES)
    study = tiny_study(tmp_path, "E2")
    settings = {line: study.settings_of("tiny", 0, line) for line in LINES}
    assert len({values.run_dir for values in settings.values()}) == len(LINES)
    assert settings["vq-2"].plan.policy == "vq" and settings["vq-2"].quantize.bits == 2
    assert settings["budget-2.5"].plan.bpw == 2.5
    assert settings["leak-first"].windows.source.endswith("texts/lambada-first.jsonl")
    assert settings["leak-first"].windows.samples == 2


def test_lines_are_measured_later_and_not_by_their_own_runs(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, "E2")
    assert study.evaluation("tiny").windows == 4
    assert study.settings_of("tiny", 0, "sq").evaluate.text is None


def test_lines_share_what_does_not_differ(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, "E13")
    shared = {line: study.settings_of("tiny", 0, line).shared_dir for line in ("sq", "vq-4", "sq-samples-8")}
    assert shared["sq"] == shared["vq-4"] != shared["sq-samples-8"]
    assert study.settings_of("tiny", 1, "sq").shared_dir != shared["sq"]


def test_seeds_count_only_where_they_matter(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path), experiments=["E4", "E18"])
    assert study.parts() == [("E4", "tiny", 0), ("E4", "tiny", 1), ("E18", "tiny", 0)]
    names = [cell.name for cell in study.family().cells]
    assert names == [f"tiny {line} seed-{seed}" for seed in (0, 1) for line in ("sq", "vq", "sq-symmetric")]


def test_an_experiment_brings_those_whose_rows_it_uses(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path), experiments=["E8"])
    assert study.experiments == ("E3", "E8")
    assert {experiment for experiment, _, _ in study.parts()} == {"E3"}


def test_every_problem_of_the_choice_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_study(write_study(tmp_path), experiments=["E99"], models=["none"], overrides=["run.runner=ray"])
    assert "E99" in str(caught.value) and "'none'" in str(caught.value) and "runner threads" in str(caught.value)


def test_halves_of_lambada_are_written_once(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, "E1")
    write_texts(study)
    files = sorted(study.texts.glob("*.jsonl"))
    assert [len(path.read_text().splitlines()) for path in files] == [3, 3]
    before = [path.stat().st_mtime_ns for path in files]
    write_texts(study)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_a_study_without_lambada_is_refused(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, "E1")
    settings = {**study.settings, "evaluate": {**study.settings["evaluate"], "lambada": None}}
    with pytest.raises(SettingsError, match="need a LAMBADA file"):
        write_texts(study.model_copy(update={"settings": settings}))


def test_the_shipped_file_is_valid() -> None:
    path = Path(__file__).parents[2] / "ablations" / "demo.yaml"
    study = load_study(path)
    assert study.seeds == (0, 1, 2) and len(study.models) == 2
    assert len(study.family().cells) == len({cell.name for cell in study.family().cells})
