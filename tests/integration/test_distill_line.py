"""Stage `distill` in the line: only where it is asked for, its vectors in the artifact, nothing done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkvq import stages
from rwkvq.artifact.reader import open_artifact
from rwkvq.artifact.verify import verify
from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.deep_verify.proof import Evidence, deep_verify
from rwkvq.distill.student import trained_weights
from rwkvq.errors import ArtifactError, QuantizationError
from rwkvq.files import sha256_of_file
from rwkvq.run import Run
from tests.commands import command
from tests.integration.conftest import SharedPool
from tests.small import LINE, settings_of, tree_hash, write_inputs
from tests.tampered import flip

pytestmark = pytest.mark.usefixtures("shared_workers")

DISTILL = ("distill.steps=8", "distill.learning_rate=0.01", "plan.policy=sq", "plan.elementwise=fp16")
WHOLE = [name for name in LINE if name != "pack"]
WHOLE.insert(WHOLE.index("evaluate"), "distill")
WHOLE.insert(WHOLE.index("evaluate"), "pack")


@pytest.fixture(scope="module", params=["x070", "x060"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Run]:
    """Settings values and the finished run; tests only read it."""
    values = write_inputs(tmp_path_factory.mktemp(request.param), request.param)
    run = Run(settings_of(values, *DISTILL), SharedPool(1, 1))
    results = [stages.run_stage(run, name) for name in stages.stages_of(run)]
    assert [(result.stage, result.ran) for result in results] == [(name, True) for name in WHOLE]
    return values, run


@pytest.fixture
def run(made: tuple[dict[str, Any], Run], tmp_path: Path) -> Run:
    """A copy of the run that a test may change."""
    values, run = made
    shutil.copytree(run.folder, tmp_path / "run")
    return Run(settings_of(values, *DISTILL, f"run_dir={tmp_path / 'run'}"), SharedPool(1, 1))


def ran(run: Run) -> list[str]:
    """The stages that had something to do."""
    return [name for name in stages.stages_of(run) if stages.run_stage(run, name).ran]


def test_a_second_time_there_is_nothing_to_do(run: Run) -> None:
    before = tree_hash(run.folder)
    assert ran(run) == [] and tree_hash(run.folder) == before


def test_the_artifact_has_the_vectors_and_equal_bits(made: tuple[dict[str, Any], Run]) -> None:
    values, run = made
    assert verify(run.artifact).stored_bits > 0
    artifact, source = open_artifact(run.artifact), open_checkpoint(Path(values["model"]))
    moved = {entry.name for entry in trained_weights(artifact.plan)}
    changed = set()
    for entry in artifact.plan.tensors:
        assert artifact.stored_bits(entry.name) == entry.stored_bits
        if entry.method == "keep":
            stored, own = artifact.weight(entry.name), source.tensor(entry.tensor)
            if not torch.equal(stored.flatten(), own.to(stored.dtype).flatten()):
                changed.add(entry.name)
    assert changed and changed <= moved
    provenance = artifact.provenance()
    assert provenance["distilled_sha256"] == sha256_of_file(run.distilled)
    assert provenance["settings"]["distill"]["steps"] == 8


def test_the_report_says_what_it_gained_and_took(made: tuple[dict[str, Any], Run]) -> None:
    _, run = made
    page, text = run.report.read_text(), (run.folder / "report.md").read_text()
    figures = json.loads(run.distillation.read_text())
    assert figures["after"] < figures["before"]
    assert "<h2>Distillation</h2>" in page and "## Distillation" in text and "It took" in text
    assert "distill" in stages.read_seconds(run)


def test_without_it_the_line_is_what_it_was(run: Run) -> None:
    plain = Run(run.settings.model_copy(update={"distill": type(run.settings.distill)()}), run.pool)
    assert "distill" not in stages.stages_of(plain)
    kept, distilled = run.artifact / "model.safetensors", tree_hash(run.artifact)
    size = kept.stat().st_size
    assert ran(plain) == ["pack", "evaluate", "report"]
    assert kept.stat().st_size == size and tree_hash(plain.artifact) != distilled
    assert open_artifact(plain.artifact).provenance()["distilled_sha256"] is None
    assert "Distillation" not in plain.report.read_text()
    assert ran(run) == ["pack", "evaluate", "report"]  # what was distilled is still there
    assert tree_hash(run.artifact) == distilled


def test_a_killed_stage_starts_again_and_damage_is_mended(run: Run) -> None:
    expected = tree_hash(run.artifact), run.distilled.read_bytes()
    (run.folder / "manifests" / "distill.json").unlink()
    run.distilled.unlink()
    workers = run.settings.run.model_copy(update={"workers": 2})
    beside = Run(run.settings.model_copy(update={"run": workers}), run.pool)
    assert ran(beside) == ["distill"]
    assert run.distilled.read_bytes() == expected[1]
    run.distilled.write_bytes(expected[1][:-1] + b"\1")
    shutil.rmtree(run.artifact)
    assert ran(run)[:2] == ["distill", "pack"]
    assert (tree_hash(run.artifact), run.distilled.read_bytes()) == expected


def test_other_steps_need_what_follows_only(run: Run) -> None:
    more = run.settings.distill.model_copy(update={"steps": 9})
    changed = Run(run.settings.model_copy(update={"distill": more}), run.pool)
    assert ran(changed) == ["distill", "pack", "evaluate", "report"]


def test_vectors_that_are_not_there_are_asked_for(run: Run) -> None:
    from rwkvq.stages.bodies import run_pack

    run.distilled.write_bytes(b"")
    with pytest.raises(QuantizationError, match="run stage distill again"):
        run_pack(run, lambda what, done, total: None)


def test_the_proof_distills_again(run: Run, made: tuple[dict[str, Any], Run]) -> None:
    evidence = Evidence(Path(made[0]["model"]), activations=run.activations, tensor="blocks.1.ffn.key.weight")
    report = deep_verify(open_artifact(run.artifact), evidence)
    assert report.distilled == len(trained_weights(open_artifact(run.artifact).plan)) and report.kept == 2
    flip(run.artifact, "blocks.1.ln2.weight")
    with pytest.raises(ArtifactError, match=r"blocks\.1\.ln2\.weight: .* was changed after it was distilled"):
        deep_verify(open_artifact(run.artifact), evidence)


def test_the_commands(made: tuple[dict[str, Any], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, run = made
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps(values))
    shown = command(capsys, "stage", "distill", "--params", params, "--if-needed")
    assert shown.code == 0 and "distill.steps is 0" in shown.err
    sets = [part for item in DISTILL for part in ("--set", item)]
    planned = command(capsys, "plan", "--params", params, *sets, "--json")
    assert [stage["stage"] for stage in json.loads(planned.out)["stages"]] == WHOLE
    folder, out = run.folder.parent, tmp_path / "out"
    small = ("samples=12", "length=48", "held_out=2")
    arguments = [part for item in small for part in ("--set", f"windows.{item}")]
    quantized = command(
        capsys,
        *("quantize", values["model"], "--out", out, "--calibration", folder / "calibration.txt"),
        *("--tokenizer", folder / "vocabulary.txt", "--policy", "sq", "--distill", "--set", "distill.steps=2"),
        *arguments,
    )
    assert quantized.code == 0, quantized.err
    assert open_artifact(out).provenance()["settings"]["distill"]["steps"] == 2
