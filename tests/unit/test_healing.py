"""What healing finds, builds again, and refuses, on the files of one tiny run."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rwkvq import stages
from rwkvq.errors import ActivationError, QuantizationError
from rwkvq.run import Run
from rwkvq.stages import healing
from rwkvq.stages.blocks import block_jobs, heal_quantized, quantize_in_pool
from rwkvq.workers import WorkerPool
from tests.small import settings_of, tree_hash, write_inputs
from tests.tiny import write_tiny

STAGES_BEFORE_PACK = ("windows", "activations", "proxies", "plan", "quantize")


Made = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(run folder, settings values) of a run up to stage `quantize`; tests copy it."""
    values = write_inputs(tmp_path_factory.mktemp("made"))
    run = Run(settings_of(values))
    with WorkerPool(1, 1) as pool:
        for name in STAGES_BEFORE_PACK:
            stages.run_stage(Run(run.settings, pool), name)
    return run.folder, values


@pytest.fixture
def run(made: Made, tmp_path: Path) -> Run:
    """A copy of that run and of its model."""
    folder, values = made
    shutil.copytree(folder, tmp_path / "run")
    shutil.copyfile(values["model"], tmp_path / "model.pth")
    return Run(settings_of(values | {"run_dir": str(tmp_path / "run"), "model": str(tmp_path / "model.pth")}))


def flip(path: Path, place: float) -> None:
    """Flip one bit of the byte at this fraction of the file."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x10
    path.write_bytes(data)


def damage(path: Path, how: str) -> None:
    """Do one of the things that disks do."""
    if how == "flipped":
        flip(path, 0.5)
    elif how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "empty":
        os.truncate(path, 0)
    else:
        path.unlink()


def assert_as_made(made: Made, folder: Path) -> None:
    assert tree_hash(folder) == tree_hash(made[0] / folder.name)


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "vanished"])
def test_only_what_is_damaged_is_built_again(made: Made, run: Run, how: str, caplog: pytest.LogCaptureFixture) -> None:
    damaged = run.activations / "block-000.parquet"
    others = {path: path.stat().st_mtime_ns for path in set(run.activations.iterdir()) - {damaged}}
    damage(damaged, how)
    assert healing.heal_activations(run) == [damaged]
    assert_as_made(made, run.activations)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert [str(damaged) in record.getMessage() for record in caplog.records] == [True]
    assert healing.heal_activations(run) == []


def test_a_footer_that_still_reads_is_found_by_its_hash(made: Made, run: Run) -> None:
    path = run.activations / "block-001.parquet"
    path.write_bytes(path.read_bytes().replace(b"parquet-cpp", b"parquet-cpq"))
    assert healing.heal_activations(run) == [path]
    assert_as_made(made, run.activations)


def test_many_that_fail_at_once_heal_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = healing.build_activations

    def counted(*arguments: Any) -> None:
        built.append(1)
        build(*arguments)

    monkeypatch.setattr(healing, "build_activations", counted)
    flip(run.activations / "block-001.parquet", 0.5)
    together, attempts = threading.Barrier(4), threading.local()

    def work() -> int:
        attempts.count = getattr(attempts, "count", 0) + 1
        if attempts.count == 1:
            together.wait(60)
            raise ActivationError("block-001.parquet: damaged")
        return attempts.count

    with ThreadPoolExecutor(4) as threads:
        assert [threads.submit(healing.healed, run, work).result for _ in range(4)]
    assert built == [1]


def test_an_error_that_comes_back_is_raised(run: Run) -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        raise ActivationError("block-000.parquet: damaged")

    with pytest.raises(ActivationError, match="damaged"):
        healing.healed(run, work)
    assert calls == [1, 1]


@pytest.mark.parametrize("changed", ["checkpoint", "windows.parquet"])
def test_what_would_come_out_otherwise_is_refused(run: Run, changed: str) -> None:
    if changed == "checkpoint":
        write_tiny(run.model_path, "x070", seed=1)
    else:
        flip(run.windows, 0.5)
    damaged = run.activations / "block-000.parquet"
    damage(damaged, "truncated")
    size = damaged.stat().st_size
    with pytest.raises(ActivationError, match=rf"{changed} has changed since it was built; run the activations stage"):
        healing.heal_activations(run)
    assert damaged.stat().st_size == size


def test_without_a_manifest_nobody_knows_what_was_there(run: Run) -> None:
    os.truncate(run.folder / "manifests" / "activations.json", 0)
    damage(run.activations / "block-000.parquet", "truncated")
    with pytest.raises(ActivationError, match="its manifest says nothing; run the activations stage again"):
        healing.heal_activations(run)


def test_block_jobs_heal_the_cache_and_go_on(made: Made, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run.quantized)
    for name in ("block-000", "block-001"):
        flip(run.activations / f"{name}.parquet", 0.3)
    with WorkerPool(2, 1) as pool:
        quantize_in_pool(run, pool, block_jobs(run), lambda what, done, total: None)
    assert_as_made(made, run.quantized)
    assert sum("building it again" in record.getMessage() for record in caplog.records) == 2


def test_a_damaged_tensor_is_quantized_again_alone(made: Made, run: Run) -> None:
    damaged = run.quantized / "block-000" / "blocks.0.att.key.weight.safetensors"
    others = {path: path.stat().st_mtime_ns for path in set(run.quantized.glob("*/*")) - {damaged}}
    flip(damaged, 0.9)
    flip(run.activations / "block-000.parquet", 0.5)  # which it needs
    assert heal_quantized(run) == [damaged]
    assert_as_made(made, run.quantized)
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_a_tensor_of_another_plan_is_not_passed_off(run: Run) -> None:
    text = run.plan.read_text()
    run.plan.write_text(text.replace('"sweeps": 2', '"sweeps": 1'))
    assert run.plan.read_text() != text
    damage(run.quantized / "block-000" / "blocks.0.att.key.weight.safetensors", "truncated")
    with pytest.raises(QuantizationError, match="with other bytes; run stage quantize again"):
        heal_quantized(run)


@pytest.mark.parametrize(("stage", "owner"), [("activations", "windows"), ("plan", "proxies"), ("pack", "windows")])
@pytest.mark.parametrize("how", ["flipped", "vanished"])
def test_damaged_inputs_are_built_again_before_a_stage_reads_them(run: Run, stage: str, owner: str, how: str) -> None:
    path = run.folder / f"{owner}.parquet"
    before = path.read_bytes()
    healing.heal_inputs(run, stage, lambda name: pytest.fail(name))
    damage(path, how)
    healing.heal_inputs(run, stage, lambda name: stages.run_stage(run, name))
    assert path.read_bytes() == before


def test_an_edited_plan_is_left_alone(run: Run) -> None:
    run.plan.write_text(run.plan.read_text() + "\n")
    for name in ("quantize", "pack", "report"):
        healing.heal_inputs(run, name, lambda owner: pytest.fail(owner))
