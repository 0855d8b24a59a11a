"""Stage manifests: what a stage ran on and what it wrote, so that a finished stage is not run again.

A manifest is `manifests/STAGE.json` in the run folder. It holds no time and no host name: equal runs write equal bytes.
Nothing else decides what to skip (docs/architecture.md 3).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkvq.files import canonical_json, code_version, write_json
from rwkvq.hashes import file_hash

__all__ = ["OutputFile", "StageManifest", "code_version", "read_manifest", "reason_to_run", "record"]

_FOLDER = "manifests"
_SHOWN_HEX = 12
"""Digits of a hash that are enough to tell two files apart in a message."""


@dataclass(frozen=True, slots=True)
class OutputFile:
    """What an output held when its stage finished: hex sha256 and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class StageManifest:
    """The record of one finished stage.

    settings: plain JSON values, the stage's own sections; inputs: hex sha256 by name; code_version: see `code_version`;
    outputs: by path relative to the run folder, or absolute for files outside it.
    """

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    code_version: str
    outputs: Mapping[str, OutputFile]

    def write(self, run_dir: Path) -> None:
        """Write `manifests/STAGE.json` atomically; raise OutputError if that is refused."""
        write_json(_location(run_dir, self.stage), asdict(self))


def record(
    run_dir: Path,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    code_version: str,
    outputs: Iterable[Path],
) -> StageManifest:
    """Hash `outputs` (files, or folders with all files below them), write the manifest and return it.

    Call it last in a stage: a stage without manifest counts as not run.
    """
    files = {_relative(run_dir, file): _output_file(file) for output in outputs for file in _files_below(output)}
    manifest = StageManifest(stage, _plain(settings), dict(inputs), code_version, files)
    manifest.write(run_dir)
    return manifest


def read_manifest(run_dir: Path, stage: str) -> StageManifest | None:
    """Return the manifest of a stage, or None if there is none or it cannot be read."""
    try:
        values = json.loads(_location(run_dir, stage).read_text(encoding="utf-8"))
        outputs = {
            str(name): OutputFile(str(item["sha256"]), int(item["size"])) for name, item in values["outputs"].items()
        }
        inputs = {str(name): str(sha256) for name, sha256 in values["inputs"].items()}
        settings, code_version = dict(values["settings"]), str(values["code_version"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        # a damaged manifest proves nothing; the stage runs again and replaces it
        return None
    return StageManifest(stage, settings, inputs, code_version, outputs)


def reason_to_run(
    run_dir: Path, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], code_version: str
) -> str | None:
    """Return why `stage` has to run, naming what changed, or None if its outputs are valid.

    Examples: "not run yet", "windows differ: seed 0 -> 1", "input checkpoint differs: 12ab... -> 34cd...",
    "outputs missing: windows.parquet", "output changed: windows.parquet".
    """
    if not _location(run_dir, stage).exists():
        return "not run yet"
    manifest = read_manifest(run_dir, stage)
    if manifest is None:
        return "manifest unreadable"
    return (
        _changed_settings(stage, manifest.settings, _plain(settings))
        or _changed_inputs(manifest.inputs, inputs)
        or _changed_code(manifest.code_version, code_version)
        or _changed_outputs(run_dir, manifest.outputs)
    )


def _location(run_dir: Path, stage: str) -> Path:
    return run_dir / _FOLDER / f"{stage}.json"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON gives them back: tuples become lists, so that a read manifest compares equal."""
    plain: dict[str, Any] = json.loads(canonical_json(dict(settings)))
    return plain


def _relative(run_dir: Path, file: Path) -> str:
    file, run_dir = file.absolute(), run_dir.absolute()
    return file.relative_to(run_dir).as_posix() if file.is_relative_to(run_dir) else file.as_posix()


def _files_below(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _output_file(path: Path) -> OutputFile:
    return OutputFile(file_hash(path), path.stat().st_size)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(_flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value})
    return flat


def _changed_settings(stage: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    before, after = _flatten(old), _flatten(new)
    unset = object()
    changes = []
    for key in sorted(before.keys() | after.keys()):
        left, right = before.get(key, unset), after.get(key, unset)
        if left != right or type(left) is not type(right):
            shown = ["unset" if value is unset else json.dumps(value, ensure_ascii=False) for value in (left, right)]
            changes.append(f"{key} {shown[0]} -> {shown[1]}")
    if not changes:
        return None
    # the sentence starts with the stage's own name, which may be a plural
    return f"{stage} {'differ' if stage.endswith('s') else 'differs'}: {', '.join(changes)}"


def _changed_inputs(old: Mapping[str, str], new: Mapping[str, str]) -> str | None:
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before is None:
            return f"input {name} is new"
        if after is None:
            return f"input {name} is no longer used"
        if before != after:
            return f"input {name} differs: {before[:_SHOWN_HEX]} -> {after[:_SHOWN_HEX]}"
    return None


def _changed_code(old: str, new: str) -> str | None:
    return None if old == new else f"code differs: {old[:_SHOWN_HEX]} -> {new[:_SHOWN_HEX]}"


def _changed_outputs(run_dir: Path, outputs: Mapping[str, OutputFile]) -> str | None:
    missing = [name for name in sorted(outputs) if not (run_dir / name).is_file()]
    if missing:
        return f"outputs missing: {', '.join(missing)}"
    for name in sorted(outputs):
        path, expected = run_dir / name, outputs[name]
        # the size is free to check; the hash costs a read
        if path.stat().st_size != expected.size or file_hash(path) != expected.sha256:
            return f"output changed: {name}"
    return None
