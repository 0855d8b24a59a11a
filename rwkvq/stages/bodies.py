"""What each stage does: library calls between its input files and its output files. Stage `quantize`: blocks.py."""

from __future__ import annotations

from typing import Any

from rwkvq.artifact.writer import software_versions, write_artifact
from rwkvq.calibration import gradients, windows
from rwkvq.checkpoint.names import weights_of
from rwkvq.device import working_on
from rwkvq.distill import distill
from rwkvq.distill.outputs import read_distilled, write_distilled
from rwkvq.evaluation.line import evaluate_run
from rwkvq.files import Progress, sha256_of_file
from rwkvq.plan.candidates import read_curves
from rwkvq.plan.policies import Curves, make_plan
from rwkvq.proxies import table
from rwkvq.report.collect import collect_report, write_report
from rwkvq.run import Run, text_hash, tokenizer_hash
from rwkvq.stages.blocks import heal_quantized, quantized_parts, read_plan, tensor_errors
from rwkvq.stages.healing import build_activations
from rwkvq.stages.stage import read_seconds
from rwkvq.threads import map_in_order, single_threaded_torch

PROVENANCE_SECTIONS = (
    "activations",
    "curves",
    "distill",
    "gradients",
    "plan",
    "proxies",
    "quantize",
    "seed",
    "windows",
)
"""The settings that decide an artifact's bytes, and are written into it."""


def sections_of(run: Run, *names: str) -> dict[str, Any]:
    """The named sections of the run's settings as plain values."""
    dumped = run.settings.model_dump(mode="json")
    return {name: dumped[name] for name in names}


def run_windows(run: Run, progress: Progress) -> None:
    """Stage `windows`."""
    settings = run.settings
    built = windows.build_windows(settings.windows, seed=settings.seed, vocab=run.checkpoint.spec.vocab)
    windows.write_windows(built, run.windows)
    progress("windows", len(built.ids), len(built.ids))


def run_activations(run: Run, progress: Progress) -> None:
    """Stage `activations`."""
    build_activations(run, progress)


def run_proxies(run: Run, progress: Progress) -> None:
    """Stage `proxies`."""
    source = run.checkpoint
    weights = weights_of(source.spec, {name: source.shape(name) for name in source.names()})
    blocks = sorted({weight.block for weight in weights if weight.block is not None})

    def measure(index: int) -> list[table.Row]:
        return table.measure_block(source, [w for w in weights if w.block == index], run.settings.proxies)

    rows = []
    with single_threaded_torch():  # each block that is measured at the same time needs a worker's memory
        for done, measured in enumerate(map_in_order(measure, blocks, run.processor_workers), 1):
            rows += measured
            progress(f"proxies of block {blocks[done - 1]}", done, len(blocks))
    table.write(run.proxies, rows, {"model_sha256": source.identity()})


def run_gradients(run: Run, progress: Progress) -> None:
    """Stage `gradients`."""
    settings, layers = run.settings, run.checkpoint.spec.layers
    with single_threaded_torch(), working_on(settings.run.device) as device:
        gradients.write_gradients(
            run.checkpoint,
            windows.read_windows(run.windows),
            run.activations,
            run.gradients,
            count=settings.gradients.windows,
            seed=settings.seed,
            workers=run.processor_workers,
            device=device,
            on_block=lambda block: progress(f"gradients of block {block}", layers - block, layers),
        )


def run_plan(run: Run, progress: Progress) -> None:
    """Stage `plan`."""
    settings = run.settings
    curves = Curves(read_curves(run.curves), settings.curves) if settings.plan.policy == "budget" else None
    rows = table.read(run.proxies)
    made = make_plan(run.checkpoint, rows, settings.plan, settings.quantize, settings.seed, curves)
    made.write(run.plan)
    progress("plan", 1, 1)


def run_distill(run: Run, progress: Progress) -> None:
    """Stage `distill`. A quantized tensor that is not as it was written is quantized again before it is read."""
    heal_quantized(run)
    result = distill(
        run.checkpoint,
        read_plan(run),
        quantized_parts(run),
        windows.read_windows(run.windows),
        run.settings.distill,
        seed=run.settings.seed,
        workers=run.workers,
        on_step=progress,
    )
    write_distilled(result, run.distilled, run.distillation)


def run_pack(run: Run, progress: Progress) -> None:
    """Stage `pack`. A quantized tensor that is not as it was written is quantized again before anything is packed."""
    heal_quantized(run)
    plan = read_plan(run)
    write_artifact(
        run.artifact,
        run.checkpoint,
        plan,
        quantized_parts(run),
        tensor_errors(run),
        distilled=read_distilled(run.distilled, plan) if run.settings.distill.steps else {},
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
        "distilled_sha256": sha256_of_file(run.distilled) if run.settings.distill.steps else None,
        "settings": sections_of(run, *PROVENANCE_SECTIONS) | {"run": {"device": run.settings.run.device}},
        "threads": run.settings.run.threads,
        "software": software_versions(),
    }


def run_evaluate(run: Run, progress: Progress) -> None:
    """Stage `evaluate`."""
    evaluate_run(run, progress)


def run_report(run: Run, progress: Progress) -> None:
    """Stage `report`."""
    write_report(collect_report(run, read_plan(run), read_seconds(run)), run)
    progress("report", 1, 1)
