"""The whole line in one process, on tiny models of both versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkvq import stages
from rwkvq.artifact.reader import open_artifact
from rwkvq.artifact.verify import verify
from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.checkpoint.spec import Version
from rwkvq.checkpoint.writer import export_checkpoint
from rwkvq.dry_run import dry_run
from rwkvq.engine.model import Engine
from rwkvq.errors import EvaluationError, PlanError
from rwkvq.plan.bits import totals
from rwkvq.run import Run
from tests.small import LINE, settings_of, tree_hash, write_inputs


@pytest.fixture(scope="module", params=["x070", "x060"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Run]:
    folder = tmp_path_factory.mktemp(request.param)
    values = write_inputs(folder, request.param, ".pth" if request.param == "x070" else ".safetensors")
    run = Run(settings_of(values))
    results = stages.run_line(run)
    assert [(result.stage, result.ran) for result in results] == [(name, True) for name in LINE]
    return values, run


def test_every_stage_leaves_its_outputs(finished: tuple[dict[str, Any], Run]) -> None:
    _, run = finished
    for path in (run.windows, run.proxies, run.plan, run.report, run.metrics, run.artifact / "model.safetensors"):
        assert path.is_file(), path
    page = run.report.read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_second_run_has_nothing_to_do(finished: tuple[dict[str, Any], Run]) -> None:
    values, run = finished
    before = tree_hash(run.folder)
    results = stages.run_line(Run(settings_of(values)))
    assert [result.ran for result in results] == [False] * len(LINE)
    assert tree_hash(run.folder) == before


def test_the_artifact_verifies_and_stores_what_the_plan_said(finished: tuple[dict[str, Any], Run]) -> None:
    _, run = finished
    report = verify(run.artifact)
    assert report.stored_bits == totals(open_artifact(run.artifact).plan).total_stored_bits
    assert report.unlisted == ()


def test_the_artifact_runs_alone_and_its_export_gives_the_same_logits(
    finished: tuple[dict[str, Any], Run], tmp_path: Path
) -> None:
    _, run = finished
    ids = torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    engine = Engine(open_artifact(run.artifact))
    packed = engine.logits(engine.hidden(ids))
    for name in ("out.pth", "out.safetensors"):
        export_checkpoint(open_artifact(run.artifact), tmp_path / name, dtype=torch.float32, overwrite=False)
        exported = Engine(open_checkpoint(tmp_path / name))
        torch.testing.assert_close(exported.logits(exported.hidden(ids)), packed, rtol=0, atol=1e-6)


def test_quantization_changes_the_model_and_beats_rounding(finished: tuple[dict[str, Any], Run]) -> None:
    _, run = finished
    models = json.loads((run.evaluation / "evaluation.json").read_text())["models"]
    assert set(models) == {"float", "rtn", "quantized"}
    assert 0 < models["quantized"]["kl"] < models["rtn"]["kl"]


def test_more_workers_give_the_same_bytes(finished: tuple[dict[str, Any], Run], tmp_path: Path) -> None:
    values, run = finished
    again = Run(settings_of(values, f"run_dir={tmp_path / 'again'}", "run.workers=2"))
    stages.run_line(again)
    assert tree_hash(again.artifact) == tree_hash(run.artifact)
    assert again.metrics.read_bytes() == run.metrics.read_bytes()


def test_a_changed_setting_is_named_and_only_what_depends_on_it_runs(
    finished: tuple[dict[str, Any], Run], tmp_path: Path
) -> None:
    values, _ = finished
    changed = Run(settings_of(values, "quantize.bits=4"))
    reasons = {name: stages.reason_for(changed, stages.STAGES[name]) for name in LINE}
    assert reasons["windows"] is reasons["activations"] is reasons["proxies"] is None
    assert reasons["plan"] == "plan differs: quantize.bits 3 -> 4"


def test_an_edited_plan_is_kept_and_followed(tmp_path: Path) -> None:
    values = write_inputs(tmp_path)
    run = Run(settings_of(values))
    stages.run_line(run)
    plan = json.loads(run.plan.read_text())
    row = next(item for item in plan["tensors"] if item["name"] == "blocks.1.att.key.weight")
    kept = next(item for item in plan["tensors"] if item["name"] == "ln_out.weight")
    row.update(method="keep", format="dense", options={}, reason="kept by hand")
    row["layout"] = kept["layout"] | {"shape": row["tensor_shape"]}
    row.pop("stored_bits", None)
    run.plan.write_text(json.dumps(plan))
    results = {result.stage: result for result in stages.run_line(Run(settings_of(values)))}
    assert not results["plan"].ran
    assert results["quantize"].reason.startswith("input plan.json differs")
    assert open_artifact(run.artifact).tensor("blocks.1.att.key.weight").dtype == torch.bfloat16


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    first = Run(settings_of(write_inputs(tmp_path / "a")))
    for name in ("windows", "activations", "proxies", "plan"):
        stages.run_stage(first, name)
    second = Run(settings_of(write_inputs(tmp_path / "b", seed=7)))
    with pytest.raises(PlanError, match="another model"):
        stages.run_line(second, plan_file=first.plan)


def test_evaluation_text_that_was_calibrated_on_is_refused(tmp_path: Path) -> None:
    values = write_inputs(tmp_path)
    values["evaluate"] |= {"text": values["windows"]["source"], "windows": 100}
    with pytest.raises(EvaluationError, match="also occur in the calibration windows"):
        stages.run_line(Run(settings_of(values)))


@pytest.mark.parametrize("policy", ["rtn", "kmeans", "hqq"])
def test_policies_without_statistics_need_no_activations(tmp_path: Path, policy: str) -> None:
    run = Run(settings_of(write_inputs(tmp_path), f"plan.policy={policy}"))
    results = stages.run_line(run)
    assert "activations" not in [result.stage for result in results]
    assert verify(run.artifact).tensors > 0


@pytest.mark.parametrize(("policy", "kind"), [("awq", "scaled"), ("rotation", "rotated")])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_scaled_and_rotated_models_run_and_verify(tmp_path: Path, version: Version, policy: str, kind: str) -> None:
    run = Run(settings_of(write_inputs(tmp_path, version), f"plan.policy={policy}"))
    preview = dry_run(run)
    stages.run_line(run)
    artifact = open_artifact(run.artifact)
    assert preview.totals == totals(artifact.plan)
    decided = [entry for entry in artifact.plan.tensors if entry.weight_class in ("matrix", "lora")]
    assert {entry.layout.format for entry in decided} == {kind}
    assert verify(run.artifact).stored_bits == totals(artifact.plan).total_stored_bits
    models = json.loads((run.evaluation / "evaluation.json").read_text())["models"]
    assert 0 < models["quantized"]["kl"] < models["rtn"]["kl"]


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_residual_codebooks_go_the_whole_line(tmp_path: Path, version: Version) -> None:
    run = Run(settings_of(write_inputs(tmp_path, version), "plan.policy=residual"))
    assert "activations" in [result.stage for result in stages.run_line(run)]
    assert verify(run.artifact).stored_bits == totals(open_artifact(run.artifact).plan).total_stored_bits
    figures = json.loads((run.evaluation / "evaluation.json").read_text())["models"]
    assert figures["quantized"]["kl"] < figures["rtn"]["kl"]


@pytest.mark.parametrize("preset", ["text", "camera", "official"])
def test_every_preset_runs(tmp_path: Path, preset: str) -> None:
    run = Run(
        settings_of(write_inputs(tmp_path), f"plan.preset={preset}", "evaluate.text=null", "evaluate.lambada=null")
    )
    stages.run_line(run)
    formats = {entry.layout.format for entry in open_artifact(run.artifact).plan.tensors}
    assert "elementwise" in formats


def test_eight_bit_embedding_and_head(tmp_path: Path) -> None:
    run = Run(settings_of(write_inputs(tmp_path), "plan.emb_bits=8", "plan.head_bits=8"))
    stages.run_line(run)
    artifact = open_artifact(run.artifact)
    plan = {entry.name: entry for entry in artifact.plan.tensors}
    assert plan["head.weight"].layout.format == plan["emb.weight"].layout.format == "scalar"
    difference = artifact.tensor("head.weight") - run.checkpoint.tensor("head.weight").float()
    assert 0 < difference.abs().max() < 0.05
