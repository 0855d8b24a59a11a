"""Well-formed files with absurd values in them: each reader refuses in one line or reads what it was given."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rwkvq.artifact.sums import write_sums
from rwkvq.artifact.verify import verify
from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.plan.plan import Plan
from rwkvq.settings import Settings, load
from tests.damage import damaged, edits, few, many, works_or_is_refused
from tests.hostile import write_safetensors, zip_with
from tests.packed import codes_of, plan_of, tiny_source, write_packed
from tests.tiny import tiny_tensors, write_tiny

Check = Callable[[Path, st.DataObject], None]

_NUMBERS = (0, -1, 3, 1 << 31, 1 << 63, 10**30, -0.0, 0.5, 1e308)
_TEXTS = ("", "x", "../../x", "a\nb", "\0", "dense", "keep", "scalar", "x070", "x" * 5000)
_LISTS = ([], [1], [[]], [None], [1 << 62, 1 << 62], [0], [-1, 2])
ABSURD = st.sampled_from([None, True, False, {}, {"a": 1}, *_NUMBERS, *_TEXTS, *_LISTS])


def change(values: Any, data: st.DataObject) -> None:
    """Replace, remove or add one value somewhere in nested objects and lists."""
    while True:
        keys = list(values) if isinstance(values, dict) else list(range(len(values)))
        key = data.draw(st.sampled_from(keys))
        below = values[key]
        if isinstance(below, dict | list) and below and data.draw(st.integers(0, 4)):
            values = below
            continue
        kind = data.draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        if kind == "replace":
            values[key] = deepcopy(data.draw(ABSURD))
        elif kind == "remove":
            del values[key]
        elif isinstance(values, dict):
            values[data.draw(st.sampled_from(("x", "", "../x", *map(str, keys))))] = deepcopy(data.draw(ABSURD))
        else:
            values.append(deepcopy(data.draw(ABSURD)))
        return


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan, an artifact in shards, a checkpoint and settings."""
    folder = tmp_path_factory.mktemp("sound")
    source = tiny_source(folder, "x070", layers=1, width=64, vocab=40)
    plan = plan_of(source)
    plan.write(folder / "plan.json")
    write_packed(folder / "artifact", source, plan, codes_of(plan), shard_bytes=20_000)
    write_tiny(folder / "model.safetensors", "x060", layers=1, width=64, vocab=40)
    torch.save(tiny_tensors("x070"), folder / "model.pth")
    (folder / "params.yaml").write_text(yaml.safe_dump(Settings().model_dump(mode="json")))
    return folder


def check_plan(sound: Path, folder: Path, data: st.DataObject) -> None:
    values = json.loads((sound / "plan.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        change(values, data)
    path = folder / "plan.json"
    path.write_text(json.dumps(values))
    works_or_is_refused(Plan.read, path)


def check_params(sound: Path, folder: Path, data: st.DataObject) -> None:
    values = yaml.safe_load((sound / "params.yaml").read_text())
    change(values, data)
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    works_or_is_refused(load, path)


def check_artifact(sound: Path, folder: Path, data: st.DataObject) -> None:
    artifact = folder / "artifact"
    if not artifact.exists():
        shutil.copytree(sound / "artifact", artifact)
    name = data.draw(st.sampled_from(("config.json", "quantization.json", "model.safetensors.index.json")))
    content = (artifact / name).read_text()
    values = json.loads(content)
    change(values, data)
    (artifact / name).write_text(json.dumps(values))
    write_sums(artifact)
    works_or_is_refused(verify, artifact)
    (artifact / name).write_text(content)


def check_header(sound: Path, folder: Path, data: st.DataObject) -> None:
    content = (sound / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header, data)
    works_or_is_refused(open_checkpoint, write_safetensors(folder / "model.safetensors", header, content[end:]))


def check_pickle(sound: Path, folder: Path, data: st.DataObject) -> None:
    with zipfile.ZipFile(sound / "model.pth") as archive:
        program = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    changed = damaged(program, data.draw(edits(len(program))))
    works_or_is_refused(open_checkpoint, zip_with(folder / "model.pth", pickled=changed or b"\0"))


def check_directory(sound: Path, folder: Path, data: st.DataObject) -> None:
    content = (sound / "model.pth").read_bytes()
    start = content.index(b"PK\1\2")
    path = folder / "model.pth"
    path.write_bytes(content[:start] + damaged(content[start:], data.draw(edits(len(content) - start))))
    works_or_is_refused(open_checkpoint, path)


CHECKS: dict[str, tuple[Callable[[Path, Path, st.DataObject], None], int]] = {
    "plan": (check_plan, 40),
    "params": (check_params, 40),
    "artifact": (check_artifact, 25),
    "safetensors header": (check_header, 60),
    "pickle": (check_pickle, 40),
    "zip directory": (check_directory, 60),
}


@pytest.mark.parametrize("kind", CHECKS)
def test_absurd_values(sound: Path, tmp_path: Path, kind: str) -> None:
    check, examples = CHECKS[kind]
    few(examples)(given(st.data())(lambda data: check(sound, tmp_path, data)))()


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKS)
def test_absurd_values_many_times(sound: Path, tmp_path: Path, kind: str) -> None:
    check, examples = CHECKS[kind]
    many(12 * examples)(given(st.data())(lambda data: check(sound, tmp_path, data)))()
