"""The line with run.device cuda, against the same on the processor."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkvq import device, stages
from rwkvq.artifact.reader import open_artifact
from rwkvq.artifact.verify import verify
from rwkvq.calibration.activations import read_block
from rwkvq.calibration.gradients import read_gradients
from rwkvq.checkpoint.spec import Version
from rwkvq.deep_verify.proof import Evidence, deep_verify
from rwkvq.documents import read_yaml
from rwkvq.errors import SettingsError
from rwkvq.plan.candidates import by_weight, read_curves
from rwkvq.quantize import block
from rwkvq.run import Run
from rwkvq.settings import Device, RunSettings, apply_overrides, parse
from tests.small import settings_of, tree_hash, write_inputs

ROOT = Path(__file__).resolve().parents[2]
BUDGET = ("plan.policy=budget", "plan.bpw=3.275", "gradients.windows=4", "curves.state_bits=8", "curves.sample=1024")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def finished(values: dict[str, Any], folder: Path, device: str, *more: str) -> Run:
    run = Run(settings_of(values, *BUDGET, f"run.device={device}", f"run_dir={folder / device}", *more))
    stages.run_line(run)
    return run


def on(name: Device) -> RunSettings:
    return RunSettings(device=name)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The shipped RWKV-7 with a plan, from a few windows, on the processor."""
    values = read_yaml(ROOT / "params.yaml")
    sets = ["windows.samples=8", "windows.held_out=0", "gradients.windows=4", "run.device=cpu"]
    folder = tmp_path_factory.mktemp("demo")
    run = Run(parse(apply_overrides(values, [*sets, f"run_dir={folder / 'run'}"]), "demo"))
    for stage in stages.stages_of(run)[: stages.stages_of(run).index("quantize")]:
        stages.run_stage(run, stage)
    return run


@needs_gpu
@pytest.mark.parametrize("version", ["x070", "x060"])
def test_a_gpu_makes_an_artifact_as_good(version: Version, tmp_path: Path) -> None:
    values = write_inputs(tmp_path, version)
    here, there = (finished(values, tmp_path, device) for device in ("cpu", "cuda"))
    curves = [by_weight(read_curves(run.curves)) for run in (here, there)]
    for name, points in curves[0].items():
        for label, point in points.items():
            assert curves[1][name][label].loss == pytest.approx(point.loss, rel=0.1)
    name = "blocks.1.att.key.weight"
    fisher = [read_gradients(run.gradients, 1, [name])[name].fisher for run in (here, there)]
    torch.testing.assert_close(fisher[1], fisher[0], rtol=0.02, atol=1e-9)
    kl = [
        json.loads((run.evaluation / "evaluation.json").read_text())["models"]["quantized"]["kl"]
        for run in (here, there)
    ]
    assert kl[1] == pytest.approx(kl[0], rel=0.1)
    assert verify(there.artifact).stored_bits == verify(here.artifact).stored_bits


@needs_gpu
def test_a_gpu_gives_the_same_bytes_again(tmp_path: Path) -> None:
    values = write_inputs(tmp_path)
    first = finished(values, tmp_path / "a", "cuda")
    assert tree_hash(finished(values, tmp_path / "b", "cuda").artifact) == tree_hash(first.artifact)
    assert not any(result.ran for result in stages.run_line(Run(first.settings)))
    evidence = Evidence(Path(values["model"]), tensor="blocks.1.att.key.weight")
    assert deep_verify(open_artifact(first.artifact), evidence).method == "trellis"


@needs_gpu
def test_the_demo_has_the_same_inputs_and_moments_on_a_gpu(demo: Run) -> None:
    """Trained weights: successive keys are aligned, which random ones never are."""
    others = Run(demo.settings.model_copy(update={"run_dir": f"{demo.folder}-cuda", "run": on("cuda")}))
    for stage in ("windows", "activations"):
        stages.run_stage(others, stage)
    source = demo.checkpoint
    for block_ in range(source.spec.layers):
        batches = [read_block(run.activations, block_, model_sha256=source.identity()) for run in (demo, others)]
        for here, there in zip(*batches, strict=True):
            torch.testing.assert_close(there.x, here.x, rtol=2e-3, atol=2e-3 * float(here.x.std()))


@needs_gpu
def test_weights_side_by_side_are_those_made_alone(demo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = [job for job in stages.block_jobs(demo) if job.block == 1]
    hashes = []
    for streams in (1, 6):
        monkeypatch.setattr(device, "STREAMS", streams)
        own = block.BlockJob(**{**asdict(job), "device": "cuda", "out_dir": f"{demo.folder}/streams-{streams}"})
        block.run(asdict(own), lambda event: None)
        hashes.append(tree_hash(own.folder))
    assert hashes[0] == hashes[1]


@needs_gpu
@pytest.mark.parametrize("policy", ["sq", "vq", "rwkvquant"])
def test_methods_without_a_kernel_take_their_statistics_from_a_gpu(policy: str, tmp_path: Path) -> None:
    values = write_inputs(tmp_path)
    run = Run(settings_of(values, f"plan.policy={policy}", "run.device=cuda"))
    stages.run_line(run)
    assert verify(run.artifact)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_says_so_before_anything_runs(tmp_path: Path) -> None:
    run = Run(settings_of(write_inputs(tmp_path), "run.device=cuda"))
    with pytest.raises(SettingsError, match=r"run\.device is not usable: found cuda, but torch sees no CUDA device"):
        stages.check_inputs(run)
