"""Policy budget through the whole line, on tiny models of both versions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rwkvq import stages, transfer
from rwkvq.artifact.reader import open_artifact
from rwkvq.artifact.verify import verify
from rwkvq.deep_verify.proof import Evidence, deep_verify
from rwkvq.dry_run import preview_plan
from rwkvq.errors import ActivationError
from rwkvq.plan.bits import totals
from rwkvq.quantize import block
from rwkvq.run import Run
from rwkvq.stages import STAGES
from rwkvq.stages.blocks import read_plan
from rwkvq.store import Store
from tests.commands import command
from tests.small import settings_of, tree_hash, write_inputs

BUDGET = ("plan.policy=budget", "plan.bpw=3.275", "gradients.windows=4", "curves.state_bits=8", "curves.sample=1024")


@pytest.fixture(scope="module", params=["x070", "x060"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Run]:
    folder = tmp_path_factory.mktemp(request.param)
    values = write_inputs(folder, request.param, ".pth" if request.param == "x070" else ".safetensors")
    run = Run(settings_of(values, *BUDGET))
    results = stages.run_line(run)
    assert [(result.stage, result.ran) for result in results] == [(name, True) for name in STAGES if name != "distill"]
    return values, run


def test_the_artifact_has_the_bits_of_the_target(finished: tuple[dict[str, Any], Run]) -> None:
    _, run = finished
    plan = open_artifact(run.artifact).plan
    bits = totals(plan).matrix_bits
    assert bits is not None and 3.2 < bits <= 3.275
    assert verify(run.artifact).stored_bits == totals(plan).total_stored_bits
    assert "budget" in run.report.read_text()


def test_it_beats_rounding_by_far(finished: tuple[dict[str, Any], Run]) -> None:
    _, run = finished
    models = json.loads((run.evaluation / "evaluation.json").read_text())["models"]
    assert models["quantized"]["kl"] < 0.6 * models["rtn"]["kl"]


def test_the_prediction_has_the_size_of_what_is_measured(finished: tuple[dict[str, Any], Run]) -> None:
    _, run = finished
    predicted = float(open_artifact(run.artifact).plan.decision["predicted_kl"])
    measured = json.loads((run.evaluation / "evaluation.json").read_text())["models"]["quantized"]["kl"]
    assert 0.2 * measured < predicted < 2 * measured


def test_a_second_run_has_nothing_to_do_and_workers_change_nothing(
    finished: tuple[dict[str, Any], Run], tmp_path: Path
) -> None:
    values, run = finished
    assert not any(result.ran for result in stages.run_line(Run(settings_of(values, *BUDGET))))
    again = Run(settings_of(values, *BUDGET, f"run_dir={tmp_path / 'again'}", "run.workers=2"))
    stages.run_line(again)
    for name in ("artifact", "gradients"):
        assert tree_hash(again.folder / name) == tree_hash(run.folder / name)
    assert again.curves.read_bytes() == run.curves.read_bytes()


def test_another_target_needs_only_a_plan_and_what_follows(
    finished: tuple[dict[str, Any], Run], tmp_path: Path
) -> None:
    values, run = finished
    shared = f"shared_dir={run.folder}"
    other = Run(settings_of(values, *BUDGET[2:], BUDGET[0], "plan.bpw=4.0", shared, f"run_dir={tmp_path / 'other'}"))
    ran = [result.stage for result in stages.run_line(other) if result.ran]
    assert ran == ["plan", "quantize", "pack", "evaluate", "report"]
    bits = totals(open_artifact(other.artifact).plan).matrix_bits
    assert bits is not None and 3.9 < bits <= 4.0


def test_one_weight_made_again_is_the_one_that_is_stored(finished: tuple[dict[str, Any], Run]) -> None:
    values, run = finished
    artifact = open_artifact(run.artifact)
    made_by = {entry.method: entry.name for entry in artifact.plan.tensors if entry.block == 1}
    for method in ("trellis", "table"):
        for cache in (None, run.activations):
            evidence = Evidence(Path(values["model"]), activations=cache, tensor=made_by[method])
            report = deep_verify(artifact, evidence)
            assert report.method == method and report.bytes > 0


def test_a_block_travels_through_a_store(finished: tuple[dict[str, Any], Run], tmp_path: Path) -> None:
    _, run = finished
    store = Store(f"file://{tmp_path / 'store'}")
    (job,) = [job for job in stages.block_jobs(run) if job.block == 1]
    elsewhere = block.BlockJob(**{**asdict(job), "out_dir": str(tmp_path / "elsewhere")})
    remote = transfer.send(store, elsewhere)
    transfer.run(asdict(remote), lambda event: None)
    assert transfer.collect(store, elsewhere) == []
    assert tree_hash(elsewhere.folder) == tree_hash(job.folder)


def test_damaged_gradients_are_made_again(finished: tuple[dict[str, Any], Run], tmp_path: Path) -> None:
    values = finished[0]
    folder = tmp_path / "run"
    own = Run(settings_of(values, *BUDGET, f"run_dir={folder}"))
    stages.run_line(own)
    path = own.gradients / "block-001.safetensors"
    before, codes = path.read_bytes(), tree_hash(own.quantized)
    path.write_bytes(before[:-4] + b"\0\0\0\1")
    (job,) = [job for job in stages.block_jobs(own) if job.block == 1]
    next(job.folder.iterdir()).unlink()
    stages.run_line(Run(own.settings))
    assert path.read_bytes() == before and tree_hash(own.quantized) == codes
    path.unlink()
    with pytest.raises(ActivationError, match="run the gradients stage again"):
        block.work_keys(job, read_plan(own))


def test_the_preview_says_what_will_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = write_inputs(tmp_path, "x070")
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps(values))
    sets = [part for item in BUDGET for part in ("--set", item)]
    shown = command(capsys, "plan", "--params", params, *sets)
    assert shown.code == 0 and all(word in shown.err for word in ("gradients", "curves", "trellis"))


@pytest.fixture(scope="module", params=["x070", "x060"])
def sized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Run]:
    values = write_inputs(tmp_path_factory.mktemp(request.param), request.param, width=256, vocab=2000)
    values["plan"] = {"policy": "budget", "size": "1300kB"}
    run = Run(settings_of(values))
    stages.run_line(run)
    return values, run


def test_a_size_is_met_with_embedding_and_head_in_the_budget(sized: tuple[dict[str, Any], Run]) -> None:
    _, run = sized
    artifact = open_artifact(run.artifact)
    size, predicted = artifact.file_bytes, int(artifact.plan.decision["predicted_bytes"])
    assert size == (run.artifact / "model.safetensors").stat().st_size
    assert 1_290_000 < size <= predicted <= min(1_300_000, 1.005 * size)
    plan = {entry.name: entry for entry in artifact.plan.tensors}
    assert plan["head.weight"].method == "gptq" and plan["emb.weight"].method == "rtn"
    assert verify(run.artifact).stored_bits == totals(artifact.plan).total_stored_bits
    head, emb = artifact.errors["head.weight"], artifact.errors["emb.weight"]
    assert 0 < head["output_error"] < 0.02 and emb["output_error"] is None


def test_embedding_and_head_are_made_again_alone(sized: tuple[dict[str, Any], Run]) -> None:
    values, run = sized
    sealed = tree_hash(run.artifact)
    (run.quantized / "outer" / "head.weight.safetensors").unlink()
    again = {result.stage: result for result in stages.run_line(Run(settings_of(values, "run.workers=2")))}
    assert again["quantize"].ran and tree_hash(run.artifact) == sealed


def test_the_head_is_proved_and_travels(sized: tuple[dict[str, Any], Run], tmp_path: Path) -> None:
    values, run = sized
    for cache in (None, run.activations):
        evidence = Evidence(Path(values["model"]), activations=cache, tensor="head.weight")
        assert deep_verify(open_artifact(run.artifact), evidence).method == "gptq"
    store = Store(f"file://{tmp_path / 'store'}")
    (job,) = [job for job in stages.block_jobs(run) if job.block is None]
    elsewhere = block.BlockJob(**{**asdict(job), "out_dir": str(tmp_path / "elsewhere")})
    remote = transfer.send(store, elsewhere)
    assert [file.name for file in remote.inputs] == ["outer.safetensors"]
    transfer.run(asdict(remote), lambda event: None)
    assert transfer.collect(store, elsewhere) == []
    assert tree_hash(elsewhere.folder) == tree_hash(job.folder)


def test_a_dry_run_meets_the_size_without_curves(sized: tuple[dict[str, Any], Run], tmp_path: Path) -> None:
    plan = preview_plan(Run(settings_of(sized[0], f"run_dir={tmp_path / 'none'}")))
    assert 1_290_000 < int(plan.decision["predicted_bytes"]) <= 1_300_000
