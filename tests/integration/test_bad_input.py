"""Bad input through the real command: one line that names the place and the remedy, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rwkvq import stages
from rwkvq.files import run_lock
from rwkvq.run import Run
from rwkvq.workers import WorkerPool
from tests.commands import (
    Outcome,
    command,
    quantize_arguments,
    refused,
    unfinished,
    write_params,
)
from tests.small import settings_of, tree_hash, write_inputs
from tests.tiny import tiny_tensors

Capture = pytest.CaptureFixture[str]
BEFORE_QUANTIZE = ("windows", "activations", "proxies", "plan")


class SharedPool(WorkerPool):
    """The workers of all tests of this module: they take seconds to start, and no test here harms them."""

    started: ClassVar[WorkerPool | None] = None

    def __init__(self, workers: int, threads: int) -> None:
        if SharedPool.started is None:
            SharedPool.started = WorkerPool(1, 1)

    def run(self, *arguments: Any, **options: Any) -> Any:
        assert SharedPool.started is not None
        return SharedPool.started.run(*arguments, **options)

    def close(self) -> None:
        """Left to the fixture."""


@pytest.fixture(scope="module", autouse=True)
def workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "WorkerPool", SharedPool)
        yield
    if SharedPool.started is not None:
        SharedPool.started.close()
        SharedPool.started = None


@pytest.fixture(scope="module")
def whole(workers: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Inputs and one undisturbed run; tests work on copies."""
    folder = tmp_path_factory.mktemp("whole")
    values = write_inputs(folder)
    stages.run_line(Run(settings_of(values)))
    return folder, values


@pytest.fixture
def inputs(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the inputs, without the run."""
    folder = tmp_path / "in"
    shutil.copytree(whole[0], folder, ignore=shutil.ignore_patterns("run"))
    return folder


def copied_run(whole: tuple[Path, dict[str, Any]], folder: Path, names: tuple[str, ...]) -> Path:
    """A settings file whose run folder holds the undisturbed results of the stages `names`."""
    source, values = whole
    run, target = Run(settings_of(values)), folder / "run"
    (target / "manifests").mkdir(parents=True)
    for name in names:
        shutil.copy(run.folder / "manifests" / f"{name}.json", target / "manifests")
        for path in stages.STAGES[name].outputs(run):
            there = target / path.relative_to(run.folder)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, there)
    return write_params(folder / "params.yaml", values | {"run_dir": str(target)})


def nothing_written(folder: Path, out: Path) -> None:
    assert not out.exists()
    assert unfinished(folder) == []


def refuse_quantize(capsys: Capture, inputs: Path, *words: object, more: tuple[object, ...] = ()) -> str:
    """`quantize` must refuse, and leave neither OUT nor anything half-written."""
    out = inputs.parent / "OUT"
    line = refused(command(capsys, *quantize_arguments(inputs, out, *more)), *words)
    nothing_written(inputs.parent, out)
    return line


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
        capsys, inputs, ".weight", "group_size", "96", "128", more=("--set", "quantize.scalar.group_size=96")
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
        (("inspect", "gone"), "gone"),
        (("verify", "gone"), "gone"),
        (("compare", "gone", "gone2"), "gone"),
        (("evaluate", "gone", "--text", "a.txt"), "gone"),
        (("export", "gone", "out.pth"), "gone"),
        (("generate", "gone", "--prompt", "a"), "gone"),
        (("generate", "model.pth", "--prompt", "a"), "--tokenizer"),
        (("generate", "model.pth", "--prompt", "a", "--tokenizer", "gone.txt"), "gone.txt"),
        (("evaluate", "model.pth", "--text", "gone.txt", "--tokenizer", "vocabulary.txt"), "gone.txt"),
        (("evaluate", "model.pth", "--lambada", "gone.jsonl", "--tokenizer", "vocabulary.txt"), "gone.jsonl"),
        (("evaluate", "model.pth", "--lambada", "calibration.txt", "--tokenizer", "vocabulary.txt"), "calibration.txt"),
        (
            ("evaluate", "model.pth", "--reference", "gone.pth", "--text", "validation.txt", "--length", "20")
            + ("--tokenizer", "vocabulary.txt", "--windows", "2"),
            "gone.pth",
        ),
        (("export", "model.pth", "out.gguf"), "out.gguf"),
        (("export", "model.pth", "model.pth"), "--overwrite"),
        (("export", "model.pth", "calibration.txt/x.pth"), "calibration.txt"),
        (("verify", "model.pth"), "model.pth"),
        (("plan", "--params", "params.yaml", "--diff", "gone.json"), "gone.json"),
        (("plan", "--params", "params.yaml", "--model", "gone.pth"), "gone.pth"),
        (("plan", "--params", "params.yaml", "--out", "calibration.txt/plan.json"), "calibration.txt"),
        (
            ("generate", "model.pth", "--out", "calibration.txt/a.jsonl", "--tokenizer", "vocabulary.txt")
            + ("--tokens", "2", "--samples", "1"),
            "calibration.txt",
        ),
        (("generate", "model.pth", "--prompt", "a", "--tokenizer", "vocabulary.txt", "--top-p", "0"), "top_p"),
    ],
)
def test_other_commands_refuse_in_one_line(
    capsys: Capture,
    inputs: Path,
    whole: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(inputs)
    write_params(inputs / "params.yaml", whole[1] | {"run_dir": "new"})
    before = tree_hash(inputs)
    refused(command(capsys, *arguments), words)
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
    capsys: Capture, inputs: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    edit, words = BAD_PLANS[kind]
    plan = json.loads((whole[0] / "run" / "plan.json").read_text())
    edit(plan)
    edited = inputs / "edited.json"
    edited.write_text(json.dumps(plan))
    refuse_quantize(capsys, inputs, edited if kind != "other model" else "plan", words, more=("--plan", edited))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    params = copied_run(whole, tmp_path, BEFORE_QUANTIZE)
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


# ---------------------------------------------------------------------------------------------- where results go


def test_an_existing_folder_is_not_touched(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    refused(command(capsys, *quantize_arguments(inputs, out)), out, "already exists", "--overwrite")
    refused(command(capsys, *quantize_arguments(inputs, out, "--overwrite")), out, "is no artifact")
    assert tree_hash(out).keys() == {"diary.txt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OUT", "in"]


def test_a_file_is_not_replaced_by_a_folder(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    out.write_text("mine")
    refused(command(capsys, *quantize_arguments(inputs, out)), out, "already exists")
    refused(command(capsys, *quantize_arguments(inputs, out, "--overwrite")), out, "is no artifact")
    assert out.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused_at_the_start(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "OUT"
    for more in ((), ("--work", tmp_path / "work")):
        refused(command(capsys, *quantize_arguments(inputs, out, *more)), out, "file", "choose another folder")
    refused(command(capsys, *quantize_arguments(inputs, tmp_path / "OUT", "--work", out)), out, "is a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in"]


def test_the_work_folder_must_not_hold_the_result(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "w", tmp_path / "w" / "artifact"):
        refused(command(capsys, *quantize_arguments(inputs, out, "--work", tmp_path / "w")), out, "work folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_run_folder_in_use_is_refused(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with run_lock(work):
        refuse_quantize(capsys, inputs, work, "another run", more=("--work", work))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 MB; skipped where mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", folder):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def mount(*options: object) -> int:
    """Exit code of the mount command."""
    try:
        done = subprocess.run(["mount", *map(str, options)], capture_output=True, check=False)
    except FileNotFoundError:
        return 127
    return done.returncode


def test_a_read_only_disk_is_named_at_the_start(capsys: Capture, inputs: Path, mounted: Path) -> None:
    mount("-o", "remount,ro", mounted)
    for more in ((), ("--work", inputs.parent / "work")):
        refused(command(capsys, *quantize_arguments(inputs, mounted / "OUT", *more)), mounted / "OUT", "choose another")
    refused(command(capsys, "export", inputs / "model.pth", mounted / "a.pth"), mounted / "a.pth", "read-only")
    assert list(mounted.iterdir()) == []
    assert not (inputs.parent / "work").exists()


def test_a_folder_without_permission_is_named(capsys: Capture, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.geteuid() == 0 and subprocess.run(["chattr", "+i", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("root may write anywhere and chattr is not permitted here")
    try:
        refused(command(capsys, *quantize_arguments(inputs, folder / "OUT")), folder / "OUT", "permission")
        refused(command(capsys, "export", inputs / "model.pth", folder / "a.pth"), folder / "a.pth", "permission")
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["chattr", "-i", str(folder)], capture_output=True, check=False)


# ---------------------------------------------------------------------------------------------- a full disk


def limit(disk: Path, free: int) -> None:
    """Leave `free` bytes on the tmpfs `disk`."""
    status = os.statvfs(disk)
    used = (status.f_blocks - status.f_bfree) * status.f_bsize
    assert mount("-o", f"remount,size={used + free}", disk) == 0


@pytest.mark.parametrize("name", stages.STAGES)
def test_a_stage_on_a_full_disk_stops_in_one_line_and_goes_on_when_there_is_space(
    capsys: Capture, whole: tuple[Path, dict[str, Any]], mounted: Path, name: str
) -> None:
    names = list(stages.STAGES)
    params = copied_run(whole, mounted, tuple(names[: names.index(name)]))
    run = mounted / "run"
    # nothing fits; then the first part of it
    for free in (0, 8192) if name != "quantize" else (16384,):
        limit(mounted, free)
        line = refused(command(capsys, "stage", name, "--params", params), run, "the disk is full")
        assert "finished work is kept" in line
        assert unfinished(run) == []
        assert not (run / "manifests" / f"{name}.json").exists()
        if name == "windows":  # its one file is smaller than any part
            break
    assert mount("-o", "remount,size=64m", mounted) == 0
    assert command(capsys, "stage", name, "--params", params).code == 0
    for path in stages.STAGES[name].outputs(Run(settings_of(whole[1]))):
        mine = run / path.name
        if path.is_dir():
            assert tree_hash(mine) == tree_hash(path)
        elif path.stem != "report":  # it shows seconds
            assert mine.read_bytes() == path.read_bytes(), path.name


def test_quantize_on_a_full_disk_goes_on_when_there_is_space(
    capsys: Capture, inputs: Path, whole: tuple[Path, dict[str, Any]], mounted: Path
) -> None:
    assert mount("-o", "remount,size=1m", mounted) == 0
    arguments = quantize_arguments(inputs, mounted / "OUT")
    refused(command(capsys, *arguments), mounted, "the disk is full")
    nothing_written(mounted, mounted / "OUT")
    limit(mounted, 330_000)  # the run fits now, its copy in OUT does not
    refused(command(capsys, *arguments), mounted, "the disk is full")
    nothing_written(mounted, mounted / "OUT")
    assert mount("-o", "remount,size=64m", mounted) == 0
    assert command(capsys, *arguments).code == 0
    for name in ("model.safetensors", "quantization.json", "config.json"):
        assert (mounted / "OUT" / name).read_bytes() == (whole[0] / "run" / "artifact" / name).read_bytes()
    assert [path.name for path in mounted.iterdir()] == ["OUT"]


# ---------------------------------------------------------------------------------------------- damaged files


def flip(path: Path, place: float) -> None:
    """Flip one bit of the byte at this fraction of the file."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x10
    path.write_bytes(data)


def stage(capsys: Capture, params: Path, name: str) -> Outcome:
    return command(capsys, "stage", name, "--params", params, "--json")


def test_a_damaged_activation_page_is_named_and_only_its_file_is_built_again(
    capsys: Capture, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    params = copied_run(whole, tmp_path, BEFORE_QUANTIZE)
    folder = tmp_path / "run" / "activations"
    damaged = folder / "block-001.parquet"
    together = {damaged, folder / "v_first.parquet"}  # the outputs of block 0, one step
    others = {path: path.stat().st_mtime_ns for path in set(folder.iterdir()) - together}
    flip(damaged, 0.5)
    refused(stage(capsys, params, "quantize"), damaged, "damaged", "run the activations stage again")
    assert not (tmp_path / "run" / "manifests" / "quantize.json").exists()
    assert unfinished(tmp_path) == []
    rebuilt = json.loads(stage(capsys, params, "activations").out)
    assert rebuilt["reason"] == "output changed: activations/block-001.parquet"
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert tree_hash(folder) == tree_hash(whole[0] / "run" / "activations")
    assert stage(capsys, params, "quantize").code == 0
    assert tree_hash(tmp_path / "run" / "quantized") == tree_hash(whole[0] / "run" / "quantized")


def test_a_damaged_quantized_tensor_is_built_again(
    capsys: Capture, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    params = copied_run(whole, tmp_path, (*BEFORE_QUANTIZE, "quantize"))
    quantized = tmp_path / "run" / "quantized"
    damaged = quantized / "block-001" / "blocks.1.att.key.weight.safetensors"
    os.truncate(damaged, 100)
    refused(stage(capsys, params, "pack"), damaged, "run stage quantize again")
    assert not (tmp_path / "run" / "artifact").exists()
    assert unfinished(tmp_path) == []
    flip(quantized / "block-000" / "blocks.0.ffn.key.weight.safetensors", 0.9)
    assert "output changed" in json.loads(stage(capsys, params, "quantize").out)["reason"]
    assert stage(capsys, params, "pack").code == 0
    assert tree_hash(tmp_path / "run" / "artifact") == tree_hash(whole[0] / "run" / "artifact")


@pytest.mark.parametrize(
    ("damaged", "victim", "owner"),
    [
        ("windows.parquet", "activations", "windows"),
        ("proxies.parquet", "plan", "proxies"),
        ("artifact/model.safetensors", "evaluate", "pack"),
        ("artifact/quantization.json", "report", "pack"),
        ("evaluation/evaluation.json", "report", "evaluate"),
    ],
)
def test_a_damaged_result_is_refused_by_its_reader_and_built_again_by_its_owner(
    capsys: Capture, whole: tuple[Path, dict[str, Any]], tmp_path: Path, damaged: str, victim: str, owner: str
) -> None:
    names = list(stages.STAGES)
    params = copied_run(whole, tmp_path, tuple(names[: names.index(victim)]))
    path = tmp_path / "run" / damaged
    os.truncate(path, path.stat().st_size // 2)
    refused(stage(capsys, params, victim), path)
    assert not (tmp_path / "run" / "manifests" / f"{victim}.json").exists()
    assert json.loads(stage(capsys, params, owner).out)["reason"] == f"output changed: {damaged}"
    assert path.read_bytes() == (whole[0] / "run" / damaged).read_bytes()


@pytest.mark.parametrize("name", list(stages.STAGES)[1:])
def test_a_stage_before_its_time_names_what_it_waits_for(
    capsys: Capture, whole: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    params = write_params(tmp_path / "params.yaml", whole[1] | {"run_dir": str(tmp_path / "run")})
    if name == "proxies":
        assert stage(capsys, params, name).code == 0  # needs the checkpoint only
        return
    refused(stage(capsys, params, name), f"stage {name} waits for", "run these first: windows")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}


def test_a_damaged_artifact_is_refused_everywhere(
    capsys: Capture, whole: tuple[Path, dict[str, Any]], inputs: Path, tmp_path: Path
) -> None:
    good = whole[0] / "run" / "artifact"
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
