"""Bad input through the real command: one line that names the place and the remedy, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import command, copied_run, refuse_quantize, refused, write_params
from tests.small import tree_hash
from tests.tiny import tiny_tensors

Capture = pytest.CaptureFixture[str]
BEFORE_QUANTIZE = ("windows", "activations", "proxies", "plan")
pytestmark = pytest.mark.usefixtures("shared_workers")


# ---------------------------------------------------------------------------------------------- the model


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def change(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = tiny_tensors("x070")
        edit(tensors)
        torch.save(tensors, path)

    return write


def rename_to_rwkv5(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks.0.att.time_mix_k"] = tensors.pop("blocks.0.att.x_k")


BAD_MODELS = {
    "truncated": (truncate, "truncated or damaged"),
    "payload": (lambda path: torch.save({"a": Payload(path.with_name("ran"))}, path), "nothing was run"),
    "bare pickle": (lambda path: path.write_bytes(pickle.dumps(Payload(path.with_name("ran")))), "nothing was run"),
    "wrong shape": (
        change(lambda t: t.update({"blocks.1.att.key.weight": torch.zeros(128, 64)})),
        "blocks.1.att.key.weight",
    ),
    "missing tensor": (change(lambda t: t.pop("blocks.1.ffn.value.weight")), "blocks.1.ffn.value.weight"),
    "unknown version": (change(rename_to_rwkv5), "not supported"),
    "no model": (lambda path: path.write_text("hello"), "truncated or damaged"),
    "empty file": (lambda path: path.write_bytes(b""), "truncated or damaged"),
    "missing": (lambda path: path.unlink(), "no such file"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_bad_model_is_refused_before_anything_is_written(capsys: Capture, inputs: Path, kind: str) -> None:
    spoil, words = BAD_MODELS[kind]
    spoil(inputs / "model.pth")
    refuse_quantize(capsys, inputs, inputs / "model.pth", words)
    assert not (inputs / "ran").exists()
    assert sorted(path.name for path in inputs.parent.iterdir()) == ["in"]
    refused(command(capsys, "inspect", inputs / "model.pth"), inputs / "model.pth", words)


@pytest.mark.parametrize("name", ["blocks.1.ffn.key.weight", "emb.weight", "blocks.0.att.x_k"])
def test_a_weight_that_is_not_a_number_is_named(capsys: Capture, inputs: Path, name: str) -> None:
    change(lambda tensors: tensors[name].view(-1)[3:4].fill_(float("nan")))(inputs / "model.pth")
    refuse_quantize(capsys, inputs, inputs / "model.pth", name)


# ---------------------------------------------------------------------------------------------- texts and tokenizers


BAD_TEXTS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("gone.txt", None, "no such file"),
    "empty": ("a.txt", b"", "empty"),
    "blank": ("a.txt", b" \n\n ", "empty"),
    "too short": ("a.txt", b"too short " * 20, "tokens"),
    "not UTF-8": ("a.txt", b"\xff\xfe\x00broken" * 300, "UTF-8"),
    "wrong field": ("a.jsonl", b'{"body": "x"}\n', "text"),
    "no JSON": ("a.jsonl", b"{oops\n", "a.jsonl"),
    "no Parquet": ("a.parquet", b"PAR1 oops", "a.parquet"),
    "unknown kind": ("a.docx", b"x", "a.docx"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_bad_text_is_refused(capsys: Capture, inputs: Path, kind: str) -> None:
    name, content, words = BAD_TEXTS[kind]
    if content is not None:
        (inputs / name).write_bytes(content)
    refuse_quantize(capsys, inputs, inputs / name, words, more=("--calibration", inputs / name))


BAD_TOKENIZERS: dict[str, tuple[str, str | None, str]] = {
    "missing": ("gone.json", None, "no such file"),
    "too large": ("big.txt", "".join(f"{i + 100} {bytes([i])!r} 1\n" for i in range(256)), "320"),
    "not all bytes": ("few.txt", "1 'a' 1\n2 'b' 1\n", "byte"),
    "no JSON": ("a.json", "{oops", "a.json"),
    "no vocabulary": ("a.txt", "1 __import__('os').system('touch ran') 1\n", "a.txt"),
    "empty": ("a.txt", "", "a.txt"),
}


@pytest.mark.parametrize("kind", BAD_TOKENIZERS)
def test_a_bad_tokenizer_is_refused(capsys: Capture, inputs: Path, kind: str) -> None:
    name, content, words = BAD_TOKENIZERS[kind]
    if content is not None:
        (inputs / name).write_text(content)
    refuse_quantize(capsys, inputs, inputs / name, words, more=("--tokenizer", inputs / name))
    assert sorted(path.name for path in inputs.parent.iterdir()) == ["in"]


@pytest.mark.parametrize("option", ["--evaluate", "--lambada"])
def test_a_missing_evaluation_text_is_refused_at_the_start(capsys: Capture, inputs: Path, option: str) -> None:
    gone = inputs / "gone.txt"
    refuse_quantize(capsys, inputs, gone, "no such file", more=(option, gone))
    assert sorted(path.name for path in inputs.parent.iterdir()) == ["in"]


# ---------------------------------------------------------------------------------------------- settings and usage


def test_a_group_size_that_does_not_divide_is_refused(capsys: Capture, inputs: Path) -> None:
    refuse_quantize(
        capsys,
        inputs,
        ".weight",
        "group_size",
        "96",
        "128",
        more=("--policy", "rwkvquant", "--set", "quantize.scalar.group_size=96"),
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--policy", "best"), ("plan.policy", "best", "rwkvquant")),
        (("--preset", "best"), ("plan.preset", "best", "camera")),
        (("--set", "quantize.bits=5"), ("quantize.bits", "5")),
        (("--set", "quantize.bitz=3"), ("quantize.bitz", "unknown key", "damping")),
        (("--set", "quantize.bits"), ("quantize.bits", "section.key=value")),
        (("--set", "quantize.bits=[3"), ("quantize.bits", "YAML")),
        (("--set", "seed=yes", "--set", "windows.samples=0"), ("seed", "windows.samples", "True")),
        (("--workers", "-1"), ("run.workers", "-1")),
    ],
)
def test_a_bad_option_is_refused_with_what_is_known(
    capsys: Capture, inputs: Path, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refuse_quantize(capsys, inputs, *words, more=more)
    assert sorted(path.name for path in inputs.parent.iterdir()) == ["in"]


BAD_PARAMS = {
    "several": (
        "sed: 1\nwindows: {samples: many, length: 1, lenght: 2}\nquantize: {bits: 3.5}\n",
        ("sed: unknown key", "windows.samples", "'many'", "windows.length", "windows.lenght", "quantize.bits", "3.5"),
    ),
    "no mapping": ("- 1\n- 2\n", ("mapping",)),
    "no YAML": ("a: [1\n", ("YAML",)),
    "a section as a value": ("windows: 3\n", ("windows", "3")),
    "code": ("model: !!python/object/apply:os.system ['touch ran']\n", ("YAML",)),
}


@pytest.mark.parametrize("kind", BAD_PARAMS)
@pytest.mark.parametrize("verb", [("stage", "windows"), ("plan",)])
def test_a_bad_settings_file_is_refused(capsys: Capture, tmp_path: Path, kind: str, verb: tuple[str, ...]) -> None:
    content, words = BAD_PARAMS[kind]
    params = tmp_path / "params.yaml"
    params.write_text(content)
    refused(command(capsys, *verb, "--params", params), params, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("verb", [("stage", "windows"), ("plan",)])
def test_a_missing_settings_file_is_named(capsys: Capture, tmp_path: Path, verb: tuple[str, ...]) -> None:
    refused(command(capsys, *verb, "--params", tmp_path / "gone.yaml"), tmp_path / "gone.yaml", "no such file")


@pytest.mark.parametrize(
    "arguments",
    [
        ("stage", "windoze"),
        ("stage",),
        ("quantize",),
        ("quantize", "model.pth", "--out", "OUT"),
        ("quantize", "model.pth", "--nonsense"),
        ("nonsense",),
        ("generate", "model.pth"),
        ("generate", "model.pth", "--prompt", "a", "--out", "b.jsonl"),
        ("evaluate", "model.pth"),
        ("export", "model.pth", "out.pth", "--dtype", "int4"),
        ("inspect",),
    ],
)
def test_wrong_usage_has_its_own_exit_code(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command(capsys, *arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "Usage" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("inspect gone", "gone"),
        ("verify gone", "gone"),
        ("compare gone gone2", "gone"),
        ("evaluate gone --text a.txt", "gone"),
        ("export gone out.pth", "gone"),
        ("generate gone --prompt a", "gone"),
        ("generate model.pth --prompt a", "--tokenizer"),
        ("generate model.pth --prompt a --tokenizer gone.txt", "gone.txt"),
        ("evaluate model.pth --text gone.txt --tokenizer vocabulary.txt", "gone.txt"),
        ("evaluate model.pth --lambada gone.jsonl --tokenizer vocabulary.txt", "gone.jsonl"),
        ("evaluate model.pth --lambada calibration.txt --tokenizer vocabulary.txt", "calibration.txt"),
        ("evaluate model.pth --text validation.txt --tokenizer vocabulary.txt --reference gone.pth", "gone.pth"),
        ("export model.pth out.gguf", "out.gguf"),
        ("export model.pth model.pth", "--overwrite"),
        ("export model.pth calibration.txt/x.pth", "calibration.txt"),
        ("verify model.pth", "model.pth"),
        ("plan --params params.yaml --diff gone.json", "gone.json"),
        ("plan --params params.yaml --model gone.pth", "gone.pth"),
        ("plan --params params.yaml --out calibration.txt/plan.json", "calibration.txt"),
        ("generate model.pth --out calibration.txt/a.jsonl --tokenizer vocabulary.txt --tokens 2", "calibration.txt"),
        ("generate model.pth --prompt a --tokenizer vocabulary.txt --top-p 0", "top_p"),
    ],
)
def test_other_commands_refuse_in_one_line(
    capsys: Capture,
    inputs: Path,
    undisturbed: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    words: str,
) -> None:
    monkeypatch.chdir(inputs)
    write_params(inputs / "params.yaml", undisturbed[1] | {"run_dir": "new"})
    before = tree_hash(inputs)
    refused(command(capsys, *arguments.split()), words)
    assert tree_hash(inputs) == before


# ---------------------------------------------------------------------------------------------- plans


def rows_of(plan: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = plan["tensors"]
    return rows


BAD_PLANS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda plan: rows_of(plan)[20].update(format="fancy"), "fancy"),
    "method": (lambda plan: rows_of(plan)[20].update(method="magic"), "magic"),
    "missing tensor": (lambda plan: rows_of(plan).pop(20), "missing"),
    "twice": (lambda plan: rows_of(plan).append(rows_of(plan)[20]), "2 times"),
    "other model": (lambda plan: plan.update(model_sha256="0" * 64), "another model"),
}


@pytest.mark.parametrize("kind", BAD_PLANS)
def test_a_bad_plan_is_refused(
    capsys: Capture, inputs: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    edit, words = BAD_PLANS[kind]
    plan = json.loads((undisturbed[0] / "run" / "plan.json").read_text())
    edit(plan)
    edited = inputs / "edited.json"
    edited.write_text(json.dumps(plan))
    refuse_quantize(capsys, inputs, edited if kind != "other model" else "plan", words, more=("--plan", edited))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    params = copied_run(undisturbed, tmp_path, BEFORE_QUANTIZE)
    shutil.copy(edited, tmp_path / "run" / "plan.json")
    refused(command(capsys, "stage", "quantize", "--params", params), words)
    assert not (tmp_path / "run" / "quantized").exists()


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_plan_that_is_none_is_refused(capsys: Capture, inputs: Path, content: str | None) -> None:
    plan = inputs / "plan.json"
    if content is not None:
        plan.write_text(content)
    refuse_quantize(capsys, inputs, plan, more=("--plan", plan))
    assert sorted(path.name for path in inputs.parent.iterdir()) == ["in"]
