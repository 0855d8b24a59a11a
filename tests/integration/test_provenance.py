"""`rwkvq verify --deep`: what the line wrote is proved by its own code, what somebody changed is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rwkvq import stages
from rwkvq.artifact.reader import open_artifact
from rwkvq.run import Run
from tests.commands import command, refused
from tests.integration.conftest import SharedPool
from tests.small import LINE, settings_of, tree_hash, write_inputs
from tests.tampered import edit, flip

Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("shared_workers")


@pytest.fixture(scope="module", params=["x060", "x070"])
def made(
    request: pytest.FixtureRequest, undisturbed: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A run of the line up to the artifact; tests only read it."""
    if request.param == "x070":
        return Run(settings_of(undisturbed[1]))
    run = Run(settings_of(write_inputs(tmp_path_factory.mktemp("deep"), request.param)), SharedPool(1, 1))
    for name in list(LINE)[: list(LINE).index("pack") + 1]:
        stages.run_stage(run, name)
    return run


@pytest.fixture
def artifact(made: Run, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may change."""
    return Path(shutil.copytree(made.artifact, tmp_path / "artifact"))


def names(artifact: Path, block: int) -> list[str]:
    """One quantized weight of every class and method in a block."""
    found = {
        (entry.weight_class, entry.method): entry.name
        for entry in open_artifact(artifact).plan.tensors
        if entry.block == block and entry.method != "keep"
    }
    assert len(found) >= 3
    return list(found.values())


@pytest.mark.parametrize("block", [0, 1])
def test_every_kind_of_weight_is_made_again(capsys: Capture, made: Run, artifact: Path, block: int) -> None:
    before = tree_hash(made.folder)
    for name in names(artifact, block):
        found = command(capsys, "verify", artifact, "--deep", made.model_path, "--tensor", name, "--json")
        assert found.code == 0, found.err
        deep = json.loads(found.out)["deep"]
        assert (deep["tensor"], deep["activations"]) == (name, "computed")
        assert all(check["same"] and check["recorded"] == check["found"] for check in deep["checks"])
    assert tree_hash(made.folder) == before


def test_activations_of_the_run_are_used(capsys: Capture, made: Run, artifact: Path) -> None:
    name = names(artifact, 1)[0]
    for option in ("--work", "--shared"):
        arguments = ("verify", artifact, "--deep", made.model_path, "--tensor", name, option, made.folder)
        found = command(capsys, *arguments, "--json")
        assert found.code == 0 and json.loads(found.out)["deep"]["activations"] == "cache"


def test_a_random_weight_and_a_table(capsys: Capture, made: Run, artifact: Path) -> None:
    shown = command(capsys, "verify", artifact, "--deep", made.model_path, "--work", made.folder)
    assert shown.code == 0 and shown.out == ""
    for words in ("chosen by --seed", "all equal", "Provenance", "checkpoint", "windows", "torch"):
        assert words in shown.err


def test_changed_codes_pass_verify_but_not_the_deep_one(capsys: Capture, made: Run, artifact: Path) -> None:
    name = names(artifact, 1)[0]
    key = next(key for key in (f"{name}::codes", f"{name}::codebook") if _holds(artifact, key))
    flip(artifact, key)
    assert command(capsys, "verify", artifact).code == 0
    deep = ("verify", artifact, "--deep", made.model_path, "--work", made.folder)
    refused(command(capsys, *deep, "--tensor", name), name, "differs in 1 of", "quantize again")
    other = next(other for other in names(artifact, 1) if other != name)
    assert command(capsys, *deep, "--tensor", other).code == 0


def _holds(artifact: Path, key: str) -> bool:
    header = (artifact / "model.safetensors").read_bytes()
    return json.dumps(key)[1:-1].encode() in header


def test_code_that_moved_on_is_shown(capsys: Capture, made: Run, artifact: Path) -> None:
    edit(artifact / "provenance.json", lambda values: values["software"].update(code_version="0" * 64))
    name = names(artifact, 0)[0]
    shown = command(capsys, "verify", artifact, "--deep", made.model_path, "--tensor", name, "--work", made.folder)
    assert shown.code == 0 and "code: not as recorded" in shown.err


def test_activations_of_another_run_are_refused(capsys: Capture, made: Run, artifact: Path, tmp_path: Path) -> None:
    other = Run(settings_of(made.settings.model_dump(mode="json"), "seed=7", f"run_dir={tmp_path / 'other'}"))
    for name in ("windows", "activations"):
        stages.run_stage(other, name)
    name = names(artifact, 1)[0]
    arguments = ("verify", artifact, "--deep", made.model_path, "--tensor", name, "--work", other.folder)
    refused(command(capsys, *arguments), tmp_path / "other", "other windows")
    gone = (*arguments[:-1], tmp_path / "gone")
    refused(command(capsys, *gone), tmp_path / "gone")


def test_a_damaged_cache_is_refused(capsys: Capture, made: Run, artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.activations, tmp_path / "copy" / "activations"))
    path = folder / "block-001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    arguments = ("verify", artifact, "--deep", made.model_path, "--tensor", names(artifact, 1)[0])
    refused(command(capsys, *arguments, "--work", tmp_path / "copy"), path)


@pytest.mark.parametrize("arguments", ["--seed 3", "--work .", "--deep m --work . --shared ."])
def test_wrong_usage(capsys: Capture, made: Run, arguments: str) -> None:
    assert command(capsys, "verify", made.artifact, *arguments.split()).code == 2
