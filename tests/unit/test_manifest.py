"""Stage manifests: a stage is skipped only if nothing changed, and the reason names what did."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rwkvq.artifact import manifest

SETTINGS = {"seed": 0, "windows": {"samples": 4, "length": 8}, "baselines": ("rtn",)}
INPUTS = {"checkpoint": "aa" * 32, "text": "bb" * 32}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "windows.parquet").write_bytes(b"ids")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "a.bin").write_bytes(b"a")
    outputs = [tmp_path / "windows.parquet", tmp_path / "folder"]
    manifest.record(tmp_path, "windows", SETTINGS, INPUTS, "c0de", outputs)
    return tmp_path


def reason(run_dir: Path, **changes: object) -> str | None:
    arguments = {"stage": "windows", "settings": SETTINGS, "inputs": INPUTS, "code_version": "c0de"} | changes
    return manifest.reason_to_run(run_dir, **arguments)  # type: ignore[arg-type]


def test_unchanged_stage_has_no_reason_to_run(run_dir: Path) -> None:
    assert reason(run_dir) is None


def test_stage_without_manifest_runs(tmp_path: Path) -> None:
    assert reason(tmp_path) == "not run yet"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"settings": SETTINGS | {"seed": 1}}, "windows differ: seed 0 -> 1"),
        (
            {"settings": SETTINGS | {"seed": 1, "windows": {"samples": 5, "length": 8}}},
            "windows differ: seed 0 -> 1, windows.samples 4 -> 5",
        ),
        ({"settings": SETTINGS | {"seed": False}}, "windows differ: seed 0 -> false"),
        ({"settings": SETTINGS | {"new": None}}, "windows differ: new unset -> null"),
        ({"settings": SETTINGS | {"baselines": ()}}, 'windows differ: baselines ["rtn"] -> []'),
        ({"inputs": INPUTS | {"text": "cc" * 32}}, "input text differs: bbbbbbbbbbbb -> cccccccccccc"),
        ({"inputs": {"checkpoint": "aa" * 32}}, "input text is no longer used"),
        ({"inputs": INPUTS | {"extra": "dd"}}, "input extra is new"),
        ({"code_version": "beef"}, "code differs: c0de -> beef"),
    ],
)
def test_reason_names_the_change(run_dir: Path, changes: dict[str, object], expected: str) -> None:
    assert reason(run_dir, **changes) == expected


def test_singular_stage_name_reads_well(tmp_path: Path) -> None:
    manifest.record(tmp_path, "plan", {"policy": "sq"}, {}, "c", [])
    assert manifest.reason_to_run(tmp_path, "plan", {"policy": "vq"}, {}, "c") == 'plan differs: policy "sq" -> "vq"'


def test_missing_and_changed_outputs_are_named(run_dir: Path) -> None:
    (run_dir / "folder" / "deep" / "a.bin").write_bytes(b"b")
    assert reason(run_dir) == "output changed: folder/deep/a.bin"
    (run_dir / "windows.parquet").unlink()
    assert reason(run_dir) == "outputs missing: windows.parquet"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"outputs": 3}', "[" * 100_000])
def test_damaged_manifest_means_run_again(run_dir: Path, content: str) -> None:
    (run_dir / "manifests" / "windows.json").write_text(content)
    assert reason(run_dir) == "manifest unreadable"


def test_equal_runs_write_equal_bytes_and_relative_paths(
    run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "windows.parquet").write_bytes(b"ids")
    (other / "folder" / "deep").mkdir(parents=True)
    (other / "folder" / "deep" / "a.bin").write_bytes(b"a")
    manifest.record(other, "windows", SETTINGS, INPUTS, "c0de", [other / "folder", other / "windows.parquet"])
    written = (run_dir / "manifests" / "windows.json").read_bytes()
    assert (other / "manifests" / "windows.json").read_bytes() == written
    assert list(json.loads(written)["outputs"]) == ["folder/deep/a.bin", "windows.parquet"]


def test_output_outside_the_run_folder_is_tracked(tmp_path: Path) -> None:
    run_dir, outside = tmp_path / "run", tmp_path / "artifact.bin"
    outside.write_bytes(b"1")
    manifest.record(run_dir, "pack", {}, {}, "c", [outside])
    assert manifest.reason_to_run(run_dir, "pack", {}, {}, "c") is None
    outside.write_bytes(b"2")
    assert manifest.reason_to_run(run_dir, "pack", {}, {}, "c") == f"output changed: {outside.as_posix()}"


def test_code_version_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sample_package_for_manifest"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = manifest.code_version(["sample_package_for_manifest"])
    assert manifest.code_version(["sample_package_for_manifest"]) == before
    (package / "one.py").write_text("x = 2\n")
    changed = manifest.code_version(["sample_package_for_manifest"])
    assert changed != before
    (package / "two.py").write_text("")
    assert manifest.code_version(["sample_package_for_manifest"]) not in (before, changed)
    monkeypatch.delitem(sys.modules, "sample_package_for_manifest", raising=False)


def test_code_version_does_not_depend_on_order() -> None:
    modules = ["rwkvq.artifact.manifest", "rwkvq.files"]
    assert manifest.code_version(modules) == manifest.code_version(modules[::-1])


def test_code_version_of_an_unknown_module() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_rwkvq"):
        manifest.code_version(["no_such_module_of_rwkvq"])
