"""Files of a run that were damaged afterwards: named by who reads them, built again by who owns them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.commands import (
    Outcome,
    command,
    copied_run,
    refused,
    unfinished,
    write_params,
)
from tests.small import LINE, tree_hash

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("shared_workers")
BEFORE_QUANTIZE = ("windows", "activations", "proxies", "plan")


def flip(path: Path, place: float) -> None:
    """Flip one bit of the byte at this fraction of the file."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x10
    path.write_bytes(data)


def stage(capsys: Capture, params: Path, name: str) -> Outcome:
    return command(capsys, "stage", name, "--params", params, "--json")


def test_a_damaged_activation_page_is_named_and_only_its_file_is_built_again(
    capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = copied_run(undisturbed, tmp_path, BEFORE_QUANTIZE)
    folder = tmp_path / "run" / "activations"
    damaged = folder / "block-001.parquet"
    together = {damaged, folder / "v_first.parquet"}  # the outputs of block 0, one step
    others = {path: path.stat().st_mtime_ns for path in set(folder.iterdir()) - together}
    flip(damaged, 0.5)
    assert stage(capsys, params, "quantize").code == 0
    assert [record.getMessage().partition(":")[0] for record in caplog.records if "damaged" in record.getMessage()] == [
        str(damaged)
    ]
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert tree_hash(folder) == tree_hash(undisturbed[0] / "run" / "activations")
    assert tree_hash(tmp_path / "run" / "quantized") == tree_hash(undisturbed[0] / "run" / "quantized")
    assert unfinished(tmp_path) == []
    assert not json.loads(stage(capsys, params, "activations").out)["ran"]


def test_a_damaged_quantized_tensor_is_quantized_again_before_it_is_packed(
    capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = copied_run(undisturbed, tmp_path, (*BEFORE_QUANTIZE, "quantize"))
    quantized = tmp_path / "run" / "quantized"
    damaged = [
        quantized / "block-000" / "blocks.0.ffn.key.weight.safetensors",
        quantized / "block-001" / "blocks.1.att.key.weight.safetensors",
    ]
    others = {path: path.stat().st_mtime_ns for path in set(quantized.glob("*/*")) - {*damaged}}
    flip(damaged[0], 0.9)  # a code: the file still opens
    os.truncate(damaged[1], 100)
    assert stage(capsys, params, "pack").code == 0
    said = [record.getMessage() for record in caplog.records if "quantizing it again" in record.getMessage()]
    assert [line.partition(":")[0] for line in said] == [str(path) for path in damaged]
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert tree_hash(tmp_path / "run" / "artifact") == tree_hash(undisturbed[0] / "run" / "artifact")
    assert not json.loads(stage(capsys, params, "quantize").out)["ran"]


@pytest.mark.parametrize(
    ("damaged", "victim", "owner"),
    [
        ("artifact/model.safetensors", "evaluate", "pack"),
        ("artifact/quantization.json", "report", "pack"),
    ],
)
def test_a_damaged_result_is_refused_by_its_reader_and_built_again_by_its_owner(
    capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, damaged: str, victim: str, owner: str
) -> None:
    names = list(LINE)
    params = copied_run(undisturbed, tmp_path, tuple(names[: names.index(victim)]))
    path = tmp_path / "run" / damaged
    os.truncate(path, path.stat().st_size // 2)
    refused(stage(capsys, params, victim), path)
    assert not (tmp_path / "run" / "manifests" / f"{victim}.json").exists()
    assert json.loads(stage(capsys, params, owner).out)["reason"] == f"output changed: {damaged}"
    assert path.read_bytes() == (undisturbed[0] / "run" / damaged).read_bytes()


@pytest.mark.parametrize(
    ("damaged", "reader"),
    [("windows.parquet", "activations"), ("proxies.parquet", "plan"), ("evaluation/evaluation.json", "report")],
)
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_small_result_is_made_again_before_it_is_read(
    capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, damaged: str, reader: str, how: str
) -> None:
    names = list(LINE)
    params = copied_run(undisturbed, tmp_path, tuple(names[: names.index(reader)]))
    path = tmp_path / "run" / damaged
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        flip(path, 0.5)
    assert stage(capsys, params, reader).code == 0
    assert path.read_bytes() == (undisturbed[0] / "run" / damaged).read_bytes()


@pytest.mark.parametrize("name", list(LINE)[1:])
def test_a_stage_before_its_time_names_what_it_waits_for(
    capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    params = write_params(tmp_path / "params.yaml", undisturbed[1] | {"run_dir": str(tmp_path / "run")})
    if name == "proxies":
        assert stage(capsys, params, name).code == 0  # needs the checkpoint only
        return
    refused(stage(capsys, params, name), f"stage {name} waits for", "run these first: windows")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}


def test_a_damaged_artifact_is_refused_everywhere(
    capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], inputs: Path, tmp_path: Path
) -> None:
    good = undisturbed[0] / "run" / "artifact"
    artifact = tmp_path / "artifact"
    shutil.copytree(good, artifact)
    flip(artifact / "model.safetensors", 0.9)
    refused(command(capsys, "verify", artifact), artifact / "model.safetensors")
    os.truncate(artifact / "model.safetensors", 10_000)
    text = inputs / "validation.txt"
    for arguments in (
        ("verify", artifact),
        ("inspect", artifact),
        ("compare", good, artifact),
        ("evaluate", artifact, "--text", text, "--windows", 2, "--length", 32),
        ("export", artifact, tmp_path / "out.pth"),
        ("generate", artifact, "--prompt", "a"),
    ):
        refused(command(capsys, *arguments), artifact)
    assert not (tmp_path / "out.pth").exists()
    for name in ("quantization.json", "config.json", "SHA256SUMS"):
        shutil.rmtree(artifact)
        shutil.copytree(good, artifact)
        (artifact / name).unlink()
        refused(command(capsys, "verify", artifact), artifact)
