"""Running stages: one, or the whole line. A stage whose manifest says that nothing has changed is skipped."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rwkvq.artifact.manifest import reason_to_run, record
from rwkvq.device import torch_device
from rwkvq.errors import EvaluationError, RwkvqError
from rwkvq.files import Progress, code_version, no_progress
from rwkvq.models.tokenizer import check_fits, load_tokenizer
from rwkvq.quantize.block import reads_gradients
from rwkvq.run import Run, text_hash, tokenizer_hash
from rwkvq.stages.blocks import checked_plan
from rwkvq.stages.healing import heal_inputs
from rwkvq.stages.stage import Hashes, Stage, StageResult, save_seconds
from rwkvq.stages.table import STAGES, stages_of
from rwkvq.store import Store
from rwkvq.threads import torch_threads

log = logging.getLogger("rwkvq.stages")

WAITS = "waits for"


def reason_for(run: Run, stage: Stage) -> str | None:
    """Why `stage` has to run, or None if its outputs are valid. A missing input of a later stage counts as a reason."""
    try:
        inputs = stage.inputs(run)
    except FileNotFoundError as error:
        return f"{WAITS} {error.filename}"
    reason = reason_to_run(run.folder_of(stage.name), stage.name, stage.settings(run), inputs, code_version(stage.code))
    if stage.name == "plan" and reason == "output changed: plan.json":
        return None  # an edited plan is the user's decision, checked when it is read
    return reason


def run_stage(run: Run, name: str, progress: Progress = no_progress) -> StageResult:
    """Run one stage unless it is done already; its manifest is written last.

    A small input that is not as its own stage wrote it is made again first (rwkvq/stages/healing.py). Raises what its
    body raises, and RwkvqError if an earlier stage has not run yet.
    """
    stage = STAGES[name]
    heal_inputs(run, name, lambda earlier: run_stage(run, earlier))
    reason = reason_for(run, stage)
    if reason is None:
        return StageResult(name, False, "up to date", 0.0)
    if reason.startswith(WAITS):
        earlier = ", ".join(list(STAGES)[: list(STAGES).index(name)])
        raise RwkvqError(f"stage {name} {reason}, which an earlier stage writes; run these first: {earlier}")
    log.info("%s: %s", name, reason)
    begin = time.monotonic()
    inputs = stage.inputs(run)  # as they are now: what changes under the work has to be noticed next time
    with torch_threads(run.processor_workers * run.settings.run.threads):
        stage.body(run, progress)
    finish_stage(run, name, inputs)
    seconds = time.monotonic() - begin
    save_seconds(run, name, seconds)
    return StageResult(name, True, reason, seconds)


def finish_stage(run: Run, name: str, inputs: Hashes | None = None) -> None:
    """Write the manifest of a stage whose outputs are complete. inputs: hashes before the work; None = as they are."""
    stage = STAGES[name]
    inputs = stage.inputs(run) if inputs is None else inputs
    record(run.folder_of(name), name, stage.settings(run), inputs, code_version(stage.code), stage.outputs(run))


def check_inputs(run: Run, plan_file: Path | None = None) -> None:
    """Fail now rather than an hour later: every input opens, tokenizer and plan fit the model, the store is known.

    Raises CheckpointError, TokenizerError, TextError, EvaluationError, PlanError, SettingsError, StoreError.
    """
    check_shared_inputs(run)
    torch_device(run.settings.run.device)
    for text in (run.settings.evaluate.text, run.settings.evaluate.lambada):
        if text and not Path(text).is_file():
            raise EvaluationError(f"{text}: no such file; give evaluation text as a file")
    if plan_file is not None:
        checked_plan(run, plan_file)
    if run.settings.run.store:
        Store(run.settings.run.store)


def check_shared_inputs(run: Run) -> None:
    """The part of `check_inputs` that the stages before the plan need: checkpoint, tokenizer and calibration text."""
    tokenizer_hash(run.tokenizer_path)
    check_fits(load_tokenizer(run.tokenizer_path), run.checkpoint.spec, run.tokenizer_path)
    text_hash(run.settings.windows.source)


def adopt_plan(run: Run, plan_file: Path) -> StageResult:
    """Use a plan made elsewhere (edited by hand) for this run. Raises PlanError if it does not fit the model."""
    checked_plan(run, plan_file).write(run.plan)
    finish_stage(run, "plan")
    return StageResult("plan", True, f"taken from {plan_file}", 0.0)


def run_line(
    run: Run, progress: Callable[[str], Progress] = lambda stage: no_progress, plan_file: Path | None = None
) -> list[StageResult]:
    """Run the whole line in this process, after check_inputs; `progress(stage)` gives the Progress of each stage."""
    with run.new_pool() as pool:  # workers start while earlier stages run
        pooled = Run(run.settings, pool)
        results = []
        for name in stages_of(run) if plan_file is None else _stages_with(run, plan_file):
            if name == "plan" and plan_file is not None:
                results.append(adopt_plan(pooled, plan_file))
            else:
                results.append(run_stage(pooled, name, progress(name)))
    return results


def _stages_with(run: Run, plan_file: Path) -> list[str]:
    """The stages of a run with a plan made elsewhere, whose methods may need more than those of the run's policy."""
    is_guided = any(map(reads_gradients, checked_plan(run, plan_file).tensors))
    needed = {*stages_of(run), "activations"} | ({"gradients"} if is_guided else set())
    return [name for name in STAGES if name in needed]


def clear_work(run: Run) -> None:
    """Delete what the stages wrote into the run folder, and that folder unless it holds files of somebody else."""
    own = [stage for name, stage in STAGES.items() if run.folder_of(name) == run.folder]
    written = [path for stage in own for path in stage.outputs(run)]
    for path in [*written, run.folder / "manifests", run.timings("plan"), run.folder / ".lock"]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    try:
        run.folder.rmdir()
    except OSError:
        log.info("%s: kept, it holds other files", run.folder)
