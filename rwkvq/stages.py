"""The stages of the line, as functions of a run: what the command line, Prefect tasks and DVC all call.

A stage reads files, writes files, and never changes a file upstream. `run_stage` skips it when its manifest says that
nothing it depends on has changed, and says why when it runs.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from rwkvq.artifact.manifest import read_manifest, reason_to_run, record
from rwkvq.artifact.writer import software_versions, write_artifact
from rwkvq.calibration import activations, windows
from rwkvq.checkpoint.names import weights_of
from rwkvq.errors import EvaluationError, QuantizationError, RwkvqError
from rwkvq.evaluation.line import evaluate_run
from rwkvq.files import Progress, code_version, no_progress, sha256_of_file, write_json
from rwkvq.models.tokenizer import check_fits, load_tokenizer
from rwkvq.plan.plan import Plan, PlannedTensor
from rwkvq.plan.policies import make_plan
from rwkvq.plan.presets import resolve_preset
from rwkvq.proxies import table
from rwkvq.quantize import block
from rwkvq.report.collect import collect_report, write_report
from rwkvq.run import Run, text_hash, tokenizer_hash
from rwkvq.threads import single_threaded_torch
from rwkvq.workers import WorkerPool

log = logging.getLogger(__name__)

Hashes = dict[str, str]

WAITS = "waits for"

PROVENANCE_SECTIONS = ("activations", "plan", "proxies", "quantize", "seed", "windows")
"""The settings that decide an artifact's bytes, and are written into it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the line.

    settings: the values that decide its result; inputs: hex sha256 by name; outputs: files and folders it writes;
    code: the modules that decide its bytes; body: the work itself.
    """

    name: str
    settings: Callable[[Run], dict[str, Any]]
    inputs: Callable[[Run], Hashes]
    outputs: Callable[[Run], list[Path]]
    code: tuple[str, ...]
    body: Callable[[Run, Progress], None]


@dataclass(frozen=True, slots=True)
class StageResult:
    """Whether a stage ran, why (or why not), and the seconds it took."""

    stage: str
    ran: bool
    reason: str
    seconds: float


def reason_for(run: Run, stage: Stage) -> str | None:
    """Why `stage` has to run, or None if its outputs are valid. A missing input of a later stage counts as a reason."""
    try:
        inputs = stage.inputs(run)
    except FileNotFoundError as error:
        return f"{WAITS} {error.filename}"
    reason = reason_to_run(run.folder, stage.name, stage.settings(run), inputs, code_version(stage.code))
    if stage.name == "plan" and reason == "output changed: plan.json":
        return None  # an edited plan is the user's decision, checked when it is read
    return reason


def run_stage(run: Run, name: str, progress: Progress = no_progress) -> StageResult:
    """Run one stage unless it is done already; its manifest is written last.

    Raises what its body raises, and RwkvqError if an earlier stage has not run yet.
    """
    stage = STAGES[name]
    reason = reason_for(run, stage)
    if reason is None:
        return StageResult(name, False, "up to date", 0.0)
    if reason.startswith(WAITS):
        earlier = ", ".join(list(STAGES)[: list(STAGES).index(name)])
        raise RwkvqError(f"stage {name} {reason}, which an earlier stage writes; run these first: {earlier}")
    log.info("%s: %s", name, reason)
    begin = time.monotonic()
    torch.set_num_threads(run.workers * run.settings.run.threads)
    stage.body(run, progress)
    finish_stage(run, name)
    seconds = time.monotonic() - begin
    save_seconds(run, name, seconds)
    return StageResult(name, True, reason, seconds)


def finish_stage(run: Run, name: str) -> None:
    """Write the manifest of a stage whose outputs are complete."""
    stage = STAGES[name]
    record(run.folder, name, stage.settings(run), stage.inputs(run), code_version(stage.code), stage.outputs(run))


def save_seconds(run: Run, name: str, seconds: float) -> None:
    """Remember how long a stage took, for the report."""
    write_json(run.timings, read_seconds(run) | {name: round(seconds, 2)})


def read_seconds(run: Run) -> dict[str, float]:
    """Seconds by stage of the last time each ran."""
    try:
        return {str(name): float(value) for name, value in json.loads(run.timings.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}


# ---------------------------------------------------------------------------------------------- bodies


def _windows(run: Run, progress: Progress) -> None:
    settings = run.settings
    built = windows.build_windows(settings.windows, seed=settings.seed, vocab=run.checkpoint.spec.vocab)
    windows.write_windows(built, run.windows)
    progress("windows", len(built.ids), len(built.ids))


def _activations(run: Run, progress: Progress) -> None:
    layers = run.checkpoint.spec.layers
    with single_threaded_torch():
        activations.write_activations(
            run.checkpoint,
            windows.read_windows(run.windows),
            run.activations,
            run.settings.activations,
            workers=run.workers,
            on_block=lambda index: progress(f"activations of block {index}", index + 1, layers),
        )


def _proxies(run: Run, progress: Progress) -> None:
    source = run.checkpoint
    weights = weights_of(source.spec, {name: source.shape(name) for name in source.names()})
    blocks = sorted({weight.block for weight in weights if weight.block is not None})
    rows = []
    for done, index in enumerate(blocks, 1):
        members = [weight for weight in weights if weight.block == index]
        rows += table.measure_block(source, members, run.settings.proxies)
        progress(f"proxies of block {index}", done, len(blocks))
    table.write(run.proxies, rows, {"model_sha256": source.identity()})


def build_plan(run: Run) -> Plan:
    """The plan of this run's settings, from the proxies table. Raises PlanError."""
    return make_plan(
        run.checkpoint, table.read(run.proxies), run.settings.plan, run.settings.quantize, run.settings.seed
    )


def _plan(run: Run, progress: Progress) -> None:
    build_plan(run).write(run.plan)
    progress("plan", 1, 1)


def read_plan(run: Run) -> Plan:
    """The run's plan, checked against the model. Raises PlanError."""
    return _checked_plan(run, run.plan)


def _checked_plan(run: Run, path: Path) -> Plan:
    plan = Plan.read(path)
    plan.check_model(run.checkpoint)
    return plan


def block_jobs(run: Run) -> list[block.BlockJob]:
    """The jobs of stage `quantize`: one a block that has something to quantize."""
    plan = read_plan(run)
    present = {entry.block for entry in plan.tensors if entry.method != "keep"}
    ordered = sorted(present, key=lambda index: (index is None, index or 0))
    places = str(run.model_path), str(run.plan), str(run.activations), str(run.quantized)
    return [block.BlockJob(*places, index) for index in ordered]


def run_job_in_pool(pool: WorkerPool, run: Run, job: block.BlockJob, on_event: Callable[[dict[str, Any]], None]) -> Any:
    """Run one block job on a worker process of `pool`, with the run's time limit and retries."""
    limits = run.settings.run
    return pool.run(
        "rwkvq.quantize.block:run", asdict(job), timeout=limits.task_timeout, retries=limits.retries, on_event=on_event
    )


def _quantize(run: Run, progress: Progress) -> None:
    jobs = block_jobs(run)
    if run.pool is not None:
        quantize_in_pool(run, run.pool, jobs, progress)
        return
    with WorkerPool(min(run.workers, max(1, len(jobs))), run.settings.run.threads) as pool:
        quantize_in_pool(run, pool, jobs, progress)


def quantize_in_pool(run: Run, pool: WorkerPool, jobs: list[block.BlockJob], progress: Progress) -> None:
    """Run all block jobs on `pool`. The first error stops the rest; finished tensors stay."""
    total = sum(len(block.planned_for(read_plan(run), job.block)) for job in jobs)
    done = 0

    def count(event: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        progress(str(event["tensor"]), done, total)

    with ThreadPoolExecutor(max_workers=run.workers) as threads:
        futures = [threads.submit(run_job_in_pool, pool, run, job, count) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            pool.close()
            raise
    finish_quantized(run)


def finish_quantized(run: Run) -> None:
    """Check that every planned tensor is there and delete files of other plans. Raises QuantizationError."""
    expected = {path for path, _ in _quantized_files(run)}
    missing = sorted(path for path in expected if not path.is_file())
    if missing:
        raise QuantizationError(f"{missing[0]}: not written ({len(missing)} tensors missing); run stage quantize again")
    for stray in set(run.quantized.rglob("*.safetensors")) - expected:
        stray.unlink()


def _quantized_files(run: Run) -> list[tuple[Path, PlannedTensor]]:
    files = []
    for job in block_jobs(run):
        files += [
            (block.tensor_path(job.folder, entry), entry) for entry in block.planned_for(read_plan(run), job.block)
        ]
    return files


def tensor_errors(run: Run) -> dict[str, dict[str, float | None]]:
    """What quantization did to each weight, by name (block.TensorError as plain values)."""
    errors = {}
    for path, entry in _quantized_files(run):
        with _quantized_file(path) as file:
            errors[entry.name] = json.loads(file.metadata()["error"])
    return errors


@contextmanager
def _quantized_file(path: Path) -> Iterator[Any]:
    """Open one quantized tensor's file. Raises QuantizationError if it cannot be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise QuantizationError(
            f"{path}: missing or damaged; run stage quantize again, it rebuilds this file"
        ) from error


def _pack(run: Run, progress: Progress) -> None:
    files = {entry.name: path for path, entry in _quantized_files(run)}
    plan = read_plan(run)

    def parts(entry: PlannedTensor) -> dict[str, Tensor]:
        with _quantized_file(files[entry.name]) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

    write_artifact(
        run.artifact,
        run.checkpoint,
        plan,
        parts,
        tensor_errors(run),
        tokenizer=run.tokenizer_path,
        provenance=provenance(run),
        overwrite=True,
        on_tensor=lambda name, done, total: progress(name, done, total),
    )


def provenance(run: Run) -> dict[str, Any]:
    """Hashes of all that the artifact came from: equal for equal work, without times or host names."""
    return {
        "checkpoint_sha256": run.checkpoint.identity(),
        "checkpoint_name": run.model_path.name,
        "text_sha256": text_hash(run.settings.windows.source),
        "tokenizer_sha256": tokenizer_hash(run.tokenizer_path),
        "windows_sha256": sha256_of_file(run.windows) if run.windows.is_file() else None,
        "plan_sha256": sha256_of_file(run.plan),
        "settings": _section(*PROVENANCE_SECTIONS)(run),
        "software": software_versions(),
    }


def _evaluate(run: Run, progress: Progress) -> None:
    evaluate_run(run, progress)


def _report(run: Run, progress: Progress) -> None:
    write_report(collect_report(run, read_plan(run), read_seconds(run)), run)
    progress("report", 1, 1)


# ---------------------------------------------------------------------------------------------- the line


def _of(*paths: Path) -> Hashes:
    return {path.name: sha256_of_file(path) for path in paths}


def _manifest_hash(run: Run, stage: str) -> str:
    """One hash for all outputs of an earlier stage: that of its manifest."""
    if read_manifest(run.folder, stage) is None:
        raise FileNotFoundError(2, "not run yet", f"stage {stage}")
    return sha256_of_file(run.folder / "manifests" / f"{stage}.json")


def _activation_hash(run: Run) -> Hashes:
    return {"activations": _manifest_hash(run, "activations")} if "activations" in stages_of(run) else {}


def _section(*names: str) -> Callable[[Run], dict[str, Any]]:
    def values(run: Run) -> dict[str, Any]:
        dumped = run.settings.model_dump(mode="json")
        return {name: dumped[name] for name in names}

    return values


def _evaluation_inputs(run: Run) -> Hashes:
    texts = run.settings.evaluate.text, run.settings.evaluate.lambada
    given = {text: text_hash(text) for text in texts if text}
    return given | {"artifact": sha256_of_file(run.artifact / "SHA256SUMS"), "checkpoint": run.checkpoint.identity()}


_MODEL_CODE = ("rwkvq.models", "rwkvq.checkpoint")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "windows",
            lambda run: _section("windows", "seed")(run) | {"vocab": run.checkpoint.spec.vocab},
            lambda run: {
                "text": text_hash(run.settings.windows.source),
                "tokenizer": tokenizer_hash(run.tokenizer_path),
            },
            lambda run: [run.windows],
            ("rwkvq.calibration.texts", "rwkvq.calibration.windows", "rwkvq.models.tokenizer"),
            _windows,
        ),
        Stage(
            "activations",
            _section("activations"),
            lambda run: {"checkpoint": run.checkpoint.identity()} | _of(run.windows),
            lambda run: [run.activations],
            (*_MODEL_CODE, *activations.CODE),
            _activations,
        ),
        Stage(
            "proxies",
            _section("proxies"),
            lambda run: {"checkpoint": run.checkpoint.identity()},
            lambda run: [run.proxies],
            ("rwkvq.proxies", "rwkvq.checkpoint"),
            _proxies,
        ),
        Stage(
            "plan",
            _section("plan", "quantize", "seed"),
            lambda run: {"checkpoint": run.checkpoint.identity()} | _of(run.proxies),
            lambda run: [run.plan],
            ("rwkvq.plan", "rwkvq.formats"),
            _plan,
        ),
        Stage(
            "quantize",
            lambda run: {},
            lambda run: _of(run.plan) | _activation_hash(run),
            lambda run: [run.quantized],
            block.CODE,
            _quantize,
        ),
        Stage(
            "pack",
            _section(*PROVENANCE_SECTIONS),
            lambda run: (
                {
                    "quantized": _manifest_hash(run, "quantize"),
                    "text": text_hash(run.settings.windows.source),
                    "tokenizer": tokenizer_hash(run.tokenizer_path),
                }
                | _of(run.plan, run.windows)
            ),
            lambda run: [run.artifact],
            ("rwkvq.artifact", "rwkvq.formats", "rwkvq.checkpoint"),
            _pack,
        ),
        Stage(
            "evaluate",
            _section("evaluate"),
            _evaluation_inputs,
            lambda run: [run.evaluation],
            # the baseline is planned, quantized and packed here
            (
                *_MODEL_CODE,
                *(f"rwkvq.{name}" for name in ("artifact", "engine", "evaluation", "formats", "plan", "quantize")),
            ),
            _evaluate,
        ),
        Stage(
            "report",
            lambda run: {},
            lambda run: {name: _manifest_hash(run, name) for name in ("plan", "proxies", "pack", "evaluate")},
            lambda run: [
                run.report,
                run.metrics,
                *(run.folder / name for name in ("report.md", "summary.json", "errors.csv")),
            ],
            ("rwkvq.report",),
            _report,
        ),
    )
}
"""The line, in order."""


def stages_of(run: Run) -> list[str]:
    """The stages this run needs, in order: a policy without statistics needs no windows' activations."""
    without = {"activations"} if run.settings.plan.policy in ("rtn", "kmeans") and not _codebooks(run) else set()
    return [name for name in STAGES if name not in without]


def _codebooks(run: Run) -> bool:
    return resolve_preset(run.settings.plan, run.settings.quantize).elementwise.format == "vq"


def check_inputs(run: Run, plan_file: Path | None = None) -> None:
    """Fail now rather than an hour later: every input opens, tokenizer and plan fit the model.

    Raises CheckpointError, TokenizerError, TextError, EvaluationError, PlanError.
    """
    tokenizer_hash(run.tokenizer_path)
    check_fits(load_tokenizer(run.tokenizer_path), run.checkpoint.spec, run.tokenizer_path)
    text_hash(run.settings.windows.source)
    for text in (run.settings.evaluate.text, run.settings.evaluate.lambada):
        if text and not Path(text).is_file():
            raise EvaluationError(f"{text}: no such file; give evaluation text as a file")
    if plan_file is not None:
        _checked_plan(run, plan_file)


def adopt_plan(run: Run, plan_file: Path) -> StageResult:
    """Use a plan made elsewhere (edited by hand) for this run. Raises PlanError if it does not fit the model."""
    _checked_plan(run, plan_file).write(run.plan)
    finish_stage(run, "plan")
    return StageResult("plan", True, f"taken from {plan_file}", 0.0)


def run_line(
    run: Run, progress: Callable[[str], Progress] = lambda stage: no_progress, plan_file: Path | None = None
) -> list[StageResult]:
    """Run the whole line in this process; `progress(stage)` gives the Progress of each stage."""
    check_inputs(run, plan_file)
    with WorkerPool(run.workers, run.settings.run.threads) as pool:  # workers start while earlier stages run
        pooled = Run(run.settings, pool)
        results = []
        for name in stages_of(run):
            if name == "plan" and plan_file is not None:
                results.append(adopt_plan(pooled, plan_file))
            else:
                results.append(run_stage(pooled, name, progress(name)))
    return results


def clear_work(run: Run) -> None:
    """Delete what the stages wrote, and the run folder unless it holds files of somebody else."""
    written = [path for stage in STAGES.values() for path in stage.outputs(run)]
    for path in [*written, run.folder / "manifests", run.timings, run.folder / ".lock"]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    try:
        run.folder.rmdir()
    except OSError:
        log.info("%s: kept, it holds other files", run.folder)
