"""What the commands print, write and return, on tiny models: the real command line, in this process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.plan.bits import totals
from rwkvq.plan.plan import Plan
from tests.commands import Outcome, command, quantize_arguments, refused, unfinished, write_params
from tests.small import LINE, tree_hash
from tests.tiny import write_tensors

Capture = pytest.CaptureFixture[str]
COMMANDS = ("quantize", "stage", "plan", "inspect", "verify", "compare", "evaluate", "export", "generate")
VARYING = {"report.html", "SHA256SUMS"}
"""The page shows seconds, and the list of checksums has the page's."""


pytestmark = pytest.mark.usefixtures("shared_workers")


@pytest.fixture
def folder(undisturbed: tuple[Path, dict[str, Any]]) -> Iterator[Path]:
    """The finished run; the test must leave it as it was."""
    before = tree_hash(undisturbed[0])
    yield undisturbed[0]
    assert tree_hash(undisturbed[0]) == before


@pytest.fixture
def params(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """The settings file of the finished run."""
    return write_params(tmp_path / "params.yaml", undisturbed[1])


@pytest.fixture
def artifact(folder: Path) -> Path:
    return folder / "run" / "artifact"


def read_json(outcome: Outcome) -> Any:
    """The JSON that a command printed; nothing else may be on stdout."""
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    return json.loads(outcome.out)


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(capsys: Capture, name: str) -> None:
    outcome = command(capsys, name, "--help")
    assert outcome.code == 0
    assert "Usage" in outcome.out and name in outcome.out


def test_help_lists_every_command(capsys: Capture) -> None:
    shown = command(capsys, "--help").out
    assert all(name in shown for name in (*COMMANDS, "lm-eval"))


def test_help_of_commands_does_not_wait_for_torch() -> None:
    # commands import what they need when they run
    code = (
        "import sys; from rwkvq.cli import app, run_app\n"
        f"codes = [run_app(app, [name, '--help']) for name in {COMMANDS}]\n"
        "assert not any(codes) and 'torch' not in sys.modules and 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---------------------------------------------------------------------------------------------- looking


def test_inspect(capsys: Capture, folder: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_json(command(capsys, "inspect", artifact, "--json"))
    bits = totals(Plan.read(folder / "run" / "plan.json"))
    assert (found["kind"], found["version"], found["policy"]) == ("artifact", "x070", "rwkvquant")
    assert found["matrix_bits"] == pytest.approx(bits.matrix_bits)
    assert found["file_bytes"] == (artifact / "model.safetensors").stat().st_size
    assert all(row["why"] for row in found["tensors"])
    plain = read_json(command(capsys, "inspect", folder / "model.pth", "--json"))
    assert (plain["kind"], plain["layers"], plain["vocab"]) == ("checkpoint", 2, 320)
    assert {"tensor": "emb.weight", "shape": "[320, 128]", "dtype": "torch.bfloat16"} in plain["tensors"]
    monkeypatch.setattr("rwkvq.cli.display.console.width", 200)
    shown = command(capsys, "inspect", artifact, "--tensors")
    assert shown.code == 0 and shown.out == "" and "blocks.0.att.key.weight" in shown.err


def test_verify(capsys: Capture, artifact: Path) -> None:
    found = read_json(command(capsys, "verify", artifact, "--json"))
    assert found["unlisted"] == [] and "model.safetensors" in found["files"]
    shown = command(capsys, "verify", artifact)
    assert shown.code == 0 and "checksums" in shown.err


def test_compare(capsys: Capture, folder: Path, artifact: Path) -> None:
    other = folder / "run" / "evaluation" / "baselines" / "rtn"
    found = read_json(command(capsys, "compare", artifact, other, "--json"))
    assert found["first"]["policy"] == "rwkvquant" and found["second"]["policy"] == "rtn"
    assert any("blocks.1.ffn.key.weight" in line for line in found["differences"])
    assert read_json(command(capsys, "compare", artifact, artifact, "--json"))["differences"] == []
    for pair in ((artifact, other), (other, artifact)):  # the baseline has no errors on record
        shown = command(capsys, "compare", *pair)
        assert shown.code == 0 and "mean_output_error" in shown.err and "differences" in shown.err


def test_evaluate(capsys: Capture, folder: Path, artifact: Path) -> None:
    texts = ("--text", folder / "validation.txt", "--windows", 4, "--length", 48)
    lambada = ("--lambada", folder / "lambada.jsonl", "--limit", 3)
    reference = ("--reference", folder / "model.pth")
    found = read_json(command(capsys, "evaluate", artifact, *reference, *texts, *lambada, "--json"))
    line = json.loads((folder / "run" / "evaluation" / "evaluation.json").read_text())["models"]["quantized"]
    assert found["text"]["ppl"] == pytest.approx(line["ppl"], rel=1e-9)
    assert found["text"]["kl"] == pytest.approx(line["kl"], rel=1e-9)
    assert found["lambada"]["examples"] == 3
    alone = read_json(command(capsys, "evaluate", artifact, *texts, "--json"))
    assert alone["text"]["ppl"] == pytest.approx(line["ppl"], rel=1e-9)
    shown = command(capsys, "evaluate", artifact, *texts)
    assert shown.code == 0 and shown.out == "" and "ppl" in shown.err


# ---------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export(capsys: Capture, artifact: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    assert command(capsys, "export", artifact, out).code == 0
    exported = open_checkpoint(out)
    assert exported.dtype("blocks.0.att.key.weight") == torch.float32
    first = out.read_bytes()
    refused(command(capsys, "export", artifact, out), out, "--overwrite")
    assert command(capsys, "export", artifact, out, "--overwrite").code == 0
    assert out.read_bytes() == first
    half = tmp_path / f"half{suffix}"
    assert command(capsys, "export", artifact, half, "--dtype", "bfloat16").code == 0
    assert half.stat().st_size < 0.6 * len(first)
    assert unfinished(tmp_path) == []


def test_generate_continues_a_prompt(capsys: Capture, folder: Path, artifact: Path) -> None:
    arguments = ("generate", artifact, "--prompt", "The sea", "--tokens", 8)
    first, again = (command(capsys, *arguments, "--seed", 3) for _ in range(2))
    assert first.code == 0 and first.out == again.out
    assert first.out.startswith("The sea") and len(first.out) > len("The sea\n")
    assert command(capsys, *arguments, "--seed", 4).out != first.out
    tokenizer = ("--tokenizer", folder / "vocabulary.txt")
    greedy = [
        command(capsys, "generate", folder / "model.pth", *tokenizer, "--prompt", "a", "--temperature", 0, "--seed", n)
        for n in (1, 2)
    ]
    assert greedy[0].out == greedy[1].out


def test_generated_texts_calibrate_a_model(
    capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, values = undisturbed
    texts = tmp_path / "texts.jsonl"
    sizes = ("--samples", 12, "--tokens", 80, "--top-p", 1)
    outcome = command(
        capsys, "generate", folder / "model.pth", "--tokenizer", folder / "vocabulary.txt", "--out", texts, *sizes
    )
    assert outcome.code == 0 and outcome.out == ""
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    assert len(rows) == 12 and all(row["text"] for row in rows)
    params = write_params(tmp_path / "params.yaml", values | {"run_dir": str(tmp_path / "run")})
    set_text = ("--set", f"windows.source={texts}")
    for name in ("windows", "activations"):
        assert command(capsys, "stage", name, "--params", params, *set_text).code == 0


def test_a_stage_that_the_policy_does_not_need(
    capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    params = write_params(tmp_path / "params.yaml", undisturbed[1] | {"run_dir": str(run)})
    outcome = command(capsys, "stage", "gradients", "--params", params, "--if-needed")
    assert outcome.code == 0 and "policy rwkvquant does not need it" in outcome.err
    found = read_json(command(capsys, "stage", "curves", "--params", params, "--if-needed", "--json"))
    assert (found["stage"], found["ran"]) == ("curves", False)
    assert not run.exists()
    assert command(capsys, "stage", "windows", "--params", params, "--if-needed").code == 0
    assert (run / "windows.parquet").is_file()


# ---------------------------------------------------------------------------------------------- the plan


def test_a_plan_is_a_dry_run(capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    values = undisturbed[1] | {"run_dir": str(tmp_path / "never")}
    params = write_params(tmp_path / "params.yaml", values)
    found = read_json(command(capsys, "plan", "--params", params, "--json"))
    assert [item["stage"] for item in found["stages"]] == list(LINE)
    assert found["stages"][0]["why"] == "not run yet"
    assert found["seconds"] > 0 and found["peak_bytes"] > 0 and found["disk_bytes"] > 0
    shown = command(capsys, "plan", "--params", params)
    assert shown.code == 0 and "matrix bits" in shown.err and "estimated" in shown.err
    assert "GPU" not in shown.err
    assert "without the GPU" in command(capsys, "plan", "--params", params, "--set", "run.device=cuda").err
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
    exact = totals(Plan.read(undisturbed[0] / "run" / "plan.json")).total_stored_bits
    assert found["totals"]["total_stored_bits"] == exact


def test_a_plan_says_what_is_done_and_what_a_change_would_run(capsys: Capture, folder: Path, params: Path) -> None:
    arguments = ("plan", "--params", params, "--json")
    done = {item["stage"]: item for item in read_json(command(capsys, *arguments))["stages"]}
    assert {item["why"] for item in done.values()} == {"up to date"}
    assert {item["seconds"] for item in done.values()} == {0.0}
    changed = read_json(command(capsys, *arguments, "--set", "quantize.bits=4"))
    why = {item["stage"]: item["why"] for item in changed["stages"]}
    assert why["activations"] == "up to date"
    assert why["plan"] == "plan differs: quantize.bits 3 -> 4"
    assert why["quantize"] == "an earlier stage runs"


def test_plans_are_written_and_compared(capsys: Capture, folder: Path, params: Path, tmp_path: Path) -> None:
    arguments = ("plan", "--params", params)
    assert command(capsys, *arguments, "--out", tmp_path / "plan.json").code == 0
    assert (tmp_path / "plan.json").read_bytes() == (folder / "run" / "plan.json").read_bytes()
    assert read_json(command(capsys, *arguments, "--diff", tmp_path / "plan.json", "--json")) == []
    four = ("--set", "quantize.bits=4", "--diff", tmp_path / "plan.json")
    differences = read_json(command(capsys, *arguments, *four, "--json"))
    assert any("blocks.1.ffn.key.weight" in line for line in differences)
    assert f"{len(differences)} differences" in command(capsys, *arguments, *four).err


# ---------------------------------------------------------------------------------------------- the line


def test_a_stage_says_whether_it_ran(capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", undisturbed[1] | {"run_dir": str(tmp_path / "run")})
    first = read_json(command(capsys, "stage", "windows", "--params", params, "--json"))
    assert (first["stage"], first["ran"], first["reason"]) == ("windows", True, "not run yet")
    again = read_json(command(capsys, "stage", "windows", "--params", params, "--json"))
    assert (again["ran"], again["reason"]) == (False, "up to date")
    changed = read_json(command(capsys, "stage", "windows", "--params", params, "--set", "seed=1", "--json"))
    assert changed["reason"] == "windows differ: seed 0 -> 1"


def without(out: Path, names: set[str] = VARYING) -> dict[str, str]:
    return {name: digest for name, digest in tree_hash(out).items() if name not in names}


def test_quantize_with_an_edited_plan_again_and_again(
    capsys: Capture, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = undisturbed
    plan = json.loads((folder / "run" / "plan.json").read_text())
    rows = {row["name"]: row for row in plan["tensors"]}
    edited, kept = rows["blocks.1.att.key.weight"], rows["ln_out.weight"]
    edited.update(method="keep", format="dense", options={}, reason="kept by hand")
    edited["layout"] = kept["layout"] | {"shape": edited["tensor_shape"]}
    edited.pop("stored_bits", None)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    out, work = tmp_path / "OUT", tmp_path / "work"
    arguments = quantize_arguments(folder, out, "--plan", tmp_path / "plan.json", "--work", work, "--keep-work")
    found = read_json(command(capsys, *arguments, "--json"))
    assert found["artifact"] == str(out) and Path(found["report"]).is_file()
    assert found["metrics"] == json.loads((out / "metrics.json").read_text())
    facts = read_json(command(capsys, "inspect", out, "--json"))
    assert {"kept by hand"} == {row["why"] for row in facts["tensors"] if row["tensor"] == edited["name"]}
    assert read_json(command(capsys, "verify", out, "--json"))["unlisted"] == []
    first, made = without(out), without(work, {"timings.json"})
    # the same command: refused without --overwrite, and with it nothing is computed twice
    refused(command(capsys, *arguments), out, "--overwrite")
    assert command(capsys, *arguments, "--overwrite").code == 0
    assert tree_hash(out).keys() == first.keys() | VARYING
    assert without(out) == first and without(work, {"timings.json"}) == made
    # from nothing, in a folder of the user's own, which is not deleted
    shutil.rmtree(work)
    work.mkdir()
    (work / "diary.txt").write_text("mine")
    again = [item for item in arguments if item != "--keep-work"]
    assert command(capsys, *again, "--overwrite").code == 0
    assert without(out) == first
    assert tree_hash(work).keys() == {"diary.txt"}
    assert unfinished(tmp_path) == []


def test_lm_eval_is_handed_its_own_options(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkvq.evaluation import harness

    handed: list[list[str]] = []
    monkeypatch.setattr(harness, "main", handed.append)
    arguments = ["run", "--model", "rwkvq", "--model_args", "path=a,b=c", "--tasks", "x", "--help"]
    assert command(capsys, "lm-eval", *arguments).code == 0
    assert handed == [arguments]


def test_a_model_of_shards_is_one_model(capsys: Capture, folder: Path, tmp_path: Path) -> None:
    source = open_checkpoint(folder / "model.pth")
    names = source.names()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        tensors = {name: source.tensor(name) for name in part}
        write_tensors(tmp_path / "shards" / f"model-{number:05d}-of-00002.safetensors", tensors)
    found = read_json(command(capsys, "inspect", tmp_path / "shards", "--json"))
    assert len(found["tensors"]) == len(names)
    (tmp_path / "shards" / "model-00002-of-00002.safetensors").unlink()
    refused(command(capsys, "inspect", tmp_path / "shards"), "model-00002-of-00002.safetensors", "missing")
