"""Provenance is proved or refused by name: recorded inputs, kept weights, one weight quantized again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from rwkvq import stages
from rwkvq.artifact.reader import open_artifact
from rwkvq.artifact.sums import write_sums
from rwkvq.artifact.verify import verify
from rwkvq.artifact.writer import write_artifact
from rwkvq.checkpoint.names import extract, weights_of
from rwkvq.checkpoint.spec import Version
from rwkvq.deep_verify import DeepReport, Evidence, deep_verify
from rwkvq.errors import ArtifactError, CheckpointError, RwkvqError, TextError
from rwkvq.formats import pack_codes
from rwkvq.plan.plan import Plan, PlannedTensor
from rwkvq.quantize.block import quantize_tensor
from rwkvq.quantize.inputs import NOTHING
from rwkvq.run import Run
from rwkvq.stages.bodies import provenance
from tests.packed import codes_of, plan_of
from tests.small import settings_of, write_inputs
from tests.tampered import edit, flip
from tests.tiny import write_tiny

Case = tuple[Path, Path]


def write_case(folder: Path, version: Version) -> Case:
    """(artifact, checkpoint): weights by method rtn and kept ones are right, all others hold made-up codes."""
    values = write_inputs(folder, version, suffix=".safetensors")
    run = Run(settings_of(values))
    plan = plan_of(run.checkpoint)
    plan.write(run.plan)
    stages.run_stage(run, "windows")
    parts, errors = quantized(run, plan)
    write_artifact(
        run.artifact,
        run.checkpoint,
        plan,
        lambda entry: parts[entry.name],
        errors,
        tokenizer=run.tokenizer_path,
        provenance=provenance(run),
        overwrite=False,
    )
    return run.artifact, run.model_path


def quantized(run: Run, plan: Plan) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, dict[str, float | None]]]:
    source = run.checkpoint
    weights = {w.name: w for w in weights_of(source.spec, {name: source.shape(name) for name in source.names()})}
    parts: dict[str, Mapping[str, Tensor]] = {name: pack_codes(code) for name, code in codes_of(plan).items()}
    errors: dict[str, dict[str, float | None]] = {}
    for entry in plan.tensors:
        if entry.method == "rtn":
            weight = extract(source.tensor(entry.tensor), weights[entry.name]).float()
            parts[entry.name], error = quantize_tensor(weight, entry, NOTHING)
            errors[entry.name] = {"weight_error": error.weight_error, "output_error": error.output_error}
        elif entry.method != "keep":
            errors[entry.name] = {"weight_error": 0.03, "output_error": None}
    return parts, errors


@pytest.fixture(scope="module", params=["x060", "x070"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return write_case(tmp_path_factory.mktemp("deep"), request.param)


@pytest.fixture
def case(sound: Case, tmp_path: Path) -> Case:
    """A copy of the artifact that a test may change, and the checkpoint."""
    return Path(shutil.copytree(sound[0], tmp_path / "artifact")), sound[1]


def first(artifact: Path, method: str) -> PlannedTensor:
    return next(entry for entry in open_artifact(artifact).plan.tensors if entry.method == method)


def prove(case: Case, **choices: Any) -> DeepReport:
    artifact, model = case
    assert verify(artifact).unlisted == ()  # whatever is wrong, the plain proof does not see it
    return deep_verify(open_artifact(artifact), Evidence(**({"model": model} | choices)))


def refusal(case: Case, error: type[RwkvqError] = ArtifactError, **choices: Any) -> str:
    with pytest.raises(error) as caught:
        prove(case, **choices)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_proved_is_reported(case: Case) -> None:
    entry = first(case[0], "rtn")
    report = prove(case, tensor=entry.name)
    plan = open_artifact(case[0]).plan
    assert all(check.is_same and check.recorded for check in report.checks)
    assert [check.what for check in report.checks[:6]] == ["checkpoint", "text", "tokenizer", "windows", "plan", "code"]
    assert report.kept == sum(item.method == "keep" for item in plan.tensors) > 0
    assert (report.tensor, report.method, report.seed, report.activations) == (entry.name, "rtn", None, "not needed")
    assert 8 * report.bytes == entry.stored_bits and report.parts == len(entry.layout.parts())


@pytest.mark.parametrize("method", ["gptq", "gptvq", "kmeans", "elementwise", "hqq", "residual"])
def test_codes_that_the_method_does_not_give_are_named(case: Case, method: str) -> None:
    name = first(case[0], method).name
    assert f"{name}: part " in (message := refusal(case, tensor=name))
    assert "bytes from what " + method in message and "quantize again" in message


def test_progress_ends_at_the_block_of_the_tensor(case: Case) -> None:
    entry = next(item for item in open_artifact(case[0]).plan.tensors if item.method == "gptq" and item.block == 0)
    seen: list[tuple[str, str, int, int]] = []
    with pytest.raises(ArtifactError):
        deep_verify(
            open_artifact(case[0]),
            Evidence(case[1], tensor=entry.name),
            lambda stage: lambda what, done, total: seen.append((stage, what, done, total)),
        )
    assert [item for item in seen if item[0] == "activations"] == [("activations", "activations of block 0", 1, 1)]


def test_flipped_bit_of_a_quantized_weight(case: Case) -> None:
    entry = first(case[0], "rtn")
    flip(case[0], f"{entry.name}::{next(iter(entry.layout.parts()))}")
    assert f"{entry.name}: part " in (message := refusal(case, tensor=entry.name))
    assert "differs in 1 of " in message and "changed after it was quantized" in message


def test_flipped_bit_of_a_kept_weight(case: Case) -> None:
    flip(case[0], "blocks.1.ln1.weight")
    assert "blocks.1.ln1.weight: is kept" in (message := refusal(case))
    assert "part values differs in 1 of 256 bytes" in message


def test_prettier_error_figures(case: Case) -> None:
    name = first(case[0], "rtn").name

    def prettier(values: dict[str, Any]) -> None:
        row = next(row for row in values["tensors"] if row["name"] == name)
        row["error"]["weight_error"] /= 2

    edit(case[0] / "quantization.json", prettier)
    assert f"{name}: its recorded error differs" in refusal(case, tensor=name)


def test_other_checkpoint(case: Case, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.safetensors", open_artifact(case[0]).spec.version, seed=1)
    assert f"another checkpoint: {other} is " in refusal(case, model=other)
    refusal(case, CheckpointError, model=tmp_path / "gone.pth")


def test_other_text(case: Case, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("some other text " * 2000)
    assert f"another text: {tmp_path / 'other.txt'} is " in refusal(case, text=str(tmp_path / "other.txt"))
    assert "gone.txt" in refusal(case, TextError, text=str(tmp_path / "gone.txt"))


def test_the_text_may_have_moved(case: Case, tmp_path: Path) -> None:
    moved = shutil.copy(case[1].parent / "calibration.txt", tmp_path / "moved.txt")
    assert prove(case, text=str(moved), tensor=first(case[0], "rtn").name).checks[3].is_same


def test_other_tokenizer(case: Case) -> None:
    path = case[0] / "tokenizer.txt"
    path.write_text(path.read_text() + "\n")
    write_sums(case[0])
    assert f"another tokenizer: {path} is " in refusal(case)


def test_windows_of_another_seed(case: Case) -> None:
    edit(case[0] / "provenance.json", lambda values: values["settings"].update(seed=5))
    assert "windows cut from" in refusal(case)


def _newer(values: dict[str, Any]) -> None:
    values["software"]["code_version"] = "0" * 64
    values["software"]["libraries"]["torch"] = "9.9.9"


def test_other_software_is_said_and_no_failure(case: Case) -> None:
    edit(case[0] / "provenance.json", _newer)
    report = prove(case, tensor=first(case[0], "rtn").name)
    assert {check.what for check in report.checks if not check.is_same} == {"code", "torch"}
    assert "so it can be sound" in refusal(case, tensor=first(case[0], "gptq").name)


def test_edited_plan_is_said(case: Case) -> None:
    edit(case[0] / "provenance.json", lambda values: values.update(plan_sha256="0" * 64))
    report = prove(case, tensor=first(case[0], "rtn").name)
    assert [check.what for check in report.checks if not check.is_same] == ["plan"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda values: values.pop("windows_sha256"), "has no windows_sha256"),
        (lambda values: values.clear(), "has no checkpoint_sha256, text_sha256"),
        (lambda values: values.update(text_sha256=3), "not all text"),
        (lambda values: values.update(software=[]), "not objects"),
        (lambda values: values["settings"].update(other=1), "other: unknown key"),
    ],
)
def test_records_that_prove_nothing(case: Case, change: Callable[[dict[str, Any]], object], expected: str) -> None:
    edit(case[0] / "provenance.json", change)
    message = refusal(case, RwkvqError)
    assert expected in message and str(case[0] / "provenance.json") in message


@pytest.mark.parametrize("name", ["blocks.9.att.key.weight", "blocks.0.ln1.weight"])
def test_only_quantized_weights_can_be_named(case: Case, name: str) -> None:
    assert f"{name} is none of its" in refusal(case, tensor=name)


def test_the_seed_chooses(case: Case) -> None:
    def chosen(seed: int) -> str:
        try:
            return str(prove(case, seed=seed).tensor)
        except ArtifactError as error:
            return str(error).split(": ")[1]

    names = [chosen(seed) for seed in range(4)]
    assert chosen(2) == names[2]
    assert len(set(names)) > 1


def test_a_model_without_quantized_weights(tmp_path: Path) -> None:
    run = Run(settings_of(write_inputs(tmp_path / "in", suffix=".safetensors")))
    plan = plan_of(run.checkpoint)
    kept = next(entry for entry in plan.tensors if entry.method == "keep").layout
    whole = tuple(
        replace(entry, method="keep", layout=type(kept)(entry.shape, "bfloat16"), options={}) for entry in plan.tensors
    )
    plan = replace(plan, tensors=whole)
    plan.write(run.plan)
    stages.run_stage(run, "windows")
    write_artifact(
        run.artifact,
        run.checkpoint,
        plan,
        lambda entry: {},
        {},
        tokenizer=run.tokenizer_path,
        provenance=provenance(run),
        overwrite=False,
    )
    report = prove((run.artifact, run.model_path))
    assert (report.kept, report.tensor, report.bytes) == (len(plan.tensors), None, 0)
