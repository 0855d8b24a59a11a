"""Damaged files of every kind that rwkvq reads: reading works or is refused in one line, and runs nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rwkvq.artifact.sums import write_sums
from rwkvq.artifact.verify import verify
from rwkvq.calibration.cache import CacheKey, CacheReader, CacheShape, CacheWriter
from rwkvq.calibration.windows import build_windows, read_windows, write_windows
from rwkvq.checkpoint.names import weights_of
from rwkvq.checkpoint.reader import Checkpoint, open_checkpoint
from rwkvq.documents import read_yaml
from rwkvq.plan.plan import Plan
from rwkvq.proxies import table
from rwkvq.quantize.results import TensorError, read_done, write_result
from rwkvq.settings import ProxiesSettings, WindowsSettings, load
from rwkvq.stages.blocks import quantized_file
from tests.damage import damaged, edits, few, many, works_or_is_refused
from tests.packed import codes_of, plan_of, tiny_source, write_packed
from tests.small import sentences
from tests.tiny import write_byte_vocabulary

PARAMS = Path(__file__).resolve().parents[2] / "params.yaml"
Reader = Callable[[Path], object]


def read_model(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        checkpoint.tensor(name)


def read_cache(path: Path) -> None:
    with CacheReader(path, "input of block 0") as reader:
        reader.read(0, reader.shape.windows)
        reader.check()


def read_quantized(path: Path) -> None:
    assert read_done(path, "key") in (None, TensorError(0.5, None))
    with quantized_file(path) as file:
        json.loads(file.metadata()["error"])
        [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 -- a handle is no mapping


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small sound file of each kind, and an artifact."""
    folder = tmp_path_factory.mktemp("sound")
    source = tiny_source(folder, "x070", layers=1, width=64, vocab=40)
    shutil.copy(source.path, folder / "model.safetensors")
    tensors = {name: source.tensor(name).clone() for name in source.names()}
    torch.save(tensors, folder / "model.pth")
    torch.save(tensors, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    plan = plan_of(source)
    plan.write(folder / "plan.json")
    write_packed(folder / "artifact", source, plan, codes_of(plan))
    write_packed(folder / "shards", source, plan, codes_of(plan), shard_bytes=20_000)
    (folder / "text.txt").write_text(sentences(60, 1))
    chosen = WindowsSettings(
        source="text.txt", tokenizer=write_byte_vocabulary(folder / "v.txt").name, samples=3, length=16, held_out=1
    )
    write_windows(build_windows(chosen, seed=0, vocab=320, base_dir=folder), folder / "windows.parquet")
    key, shape = CacheKey("a", "b", "c"), CacheShape(2, 8, 16, (1,), False)
    with CacheWriter(folder / "cache.parquet", "input of block 0", key, shape, "float16") as writer:
        writer.add(torch.ones(2, 8, 16))
    rows = _proxies(source)
    table.write(folder / "proxies.parquet", rows, {"model_sha256": "0" * 64})
    write_result(
        folder / "quantized.safetensors", {"codes": torch.arange(9, dtype=torch.uint8)}, "key", TensorError(0.5, None)
    )
    shutil.copy(PARAMS, folder / "params.yaml")
    (folder / "family.yaml").write_text(FAMILY)
    return folder


FAMILY = """family: demo
out: data/runs/demo
settings: &base {windows: {samples: 4}, quantize: {bits: 3}}
models:
  small: {model: small.pth}
policies:
  rtn: {plan: {policy: rtn}}
  mixed: {<<: *base, plan: {policy: rwkvquant}}
schedule: {cron: "0 2 * * *", timezone: UTC, paused: true}
"""


def _proxies(source: Checkpoint) -> list[table.Row]:
    shapes = {name: source.shape(name) for name in source.names()}
    return table.measure_block(source, weights_of(source.spec, shapes)[:12], ProxiesSettings())


KINDS: dict[str, Reader] = {
    "model.pth": read_model,
    "legacy.pth": read_model,
    "model.safetensors": read_model,
    "plan.json": Plan.read,
    "params.yaml": load,
    "family.yaml": read_yaml,
    "windows.parquet": read_windows,
    "cache.parquet": read_cache,
    "proxies.parquet": table.read,
    "quantized.safetensors": read_quantized,
}


def check_damage(sound: Path, folder: Path, name: str, data: st.DataObject) -> None:
    """Damage a copy of one file and read it."""
    content = (sound / name).read_bytes()
    path = folder / name
    path.write_bytes(damaged(content, data.draw(edits(len(content)))))
    works_or_is_refused(KINDS[name], path)
    assert [file.name for file in folder.iterdir()] == [name]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_damaged_here_is_sound(sound: Path, name: str) -> None:
    assert works_or_is_refused(KINDS[name], sound / name)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file(sound: Path, tmp_path: Path, name: str) -> None:
    few(40)(given(st.data())(lambda data: check_damage(sound, tmp_path, name, data)))()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_many_times(sound: Path, tmp_path: Path, name: str) -> None:
    many(500)(given(st.data())(lambda data: check_damage(sound, tmp_path, name, data)))()


ARTIFACT_FILES = ("SHA256SUMS", "config.json", "quantization.json", "provenance.json", "model.safetensors")
SHARD_FILES = ("model.safetensors.index.json", "model-00001-of-00004.safetensors")


def check_artifact(sound: Path, folder: Path, kind: str, name: str, renew: bool, data: st.DataObject) -> None:
    """Damage one file of an artifact, with or without checksums that hide it, and verify the artifact."""
    path = folder / kind / name
    content = (sound / kind / name).read_bytes()
    path.write_bytes(damaged(content, data.draw(edits(len(content)))))
    if renew and name != "SHA256SUMS":
        write_sums(folder / kind)
    same = path.read_bytes() == content
    worked = works_or_is_refused(verify, folder / kind)
    assert not worked or renew or same, "damage that the checksums should have found"
    path.write_bytes(content)
    shutil.copy(sound / kind / "SHA256SUMS", folder / kind / "SHA256SUMS")


FILES = [("artifact", name) for name in ARTIFACT_FILES] + [("shards", name) for name in SHARD_FILES]


@pytest.mark.parametrize(("kind", "name"), FILES)
@pytest.mark.parametrize("renew", [False, True])
def test_a_damaged_artifact(sound: Path, tmp_path: Path, kind: str, name: str, renew: bool) -> None:
    shutil.copytree(sound / kind, tmp_path / kind)
    few(15)(given(st.data())(lambda data: check_artifact(sound, tmp_path, kind, name, renew, data)))()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), FILES)
@pytest.mark.parametrize("renew", [False, True])
def test_a_damaged_artifact_many_times(sound: Path, tmp_path: Path, kind: str, name: str, renew: bool) -> None:
    shutil.copytree(sound / kind, tmp_path / kind)
    many(150)(given(st.data())(lambda data: check_artifact(sound, tmp_path, kind, name, renew, data)))()
