"""The line: its stages in order, and what each depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvq.artifact.manifest import read_manifest
from rwkvq.calibration import activations, gradients
from rwkvq.files import sha256_of_file
from rwkvq.plan.presets import resolve_preset
from rwkvq.quantize import block, curves
from rwkvq.run import Run, text_hash, tokenizer_hash
from rwkvq.stages import blocks, bodies
from rwkvq.stages.bodies import sections_of
from rwkvq.stages.stage import Hashes, Stage


def _of(*paths: Path) -> Hashes:
    return {path.name: sha256_of_file(path) for path in paths}


def _manifest_hash(run: Run, stage: str) -> str:
    """One hash for all outputs of an earlier stage: that of its manifest."""
    folder = run.folder_of(stage)
    if read_manifest(folder, stage) is None:
        raise FileNotFoundError(2, "not run yet", f"stage {stage}")
    return sha256_of_file(folder / "manifests" / f"{stage}.json")


def _activation_hash(run: Run) -> Hashes:
    return {"activations": _manifest_hash(run, "activations")} if "activations" in stages_of(run) else {}


def _gradient_hash(run: Run) -> Hashes:
    return {"gradients": _manifest_hash(run, "gradients")} if "gradients" in stages_of(run) else {}


def _curves_hash(run: Run) -> Hashes:
    return _of(run.curves) if "curves" in stages_of(run) else {}


def _distilled_hash(run: Run) -> Hashes:
    return _of(run.distilled) if "distill" in stages_of(run) else {}


def _section(*names: str) -> Callable[[Run], dict[str, Any]]:
    return lambda run: sections_of(run, *names)


def _computed(*names: str) -> Callable[[Run], dict[str, Any]]:
    """The sections of a stage whose results depend on where it computes."""
    return lambda run: sections_of(run, *names) | {"device": run.settings.run.device}


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
            bodies.run_windows,
        ),
        Stage(
            "activations",
            _computed("activations"),
            lambda run: {"checkpoint": run.checkpoint.identity()} | _of(run.windows),
            lambda run: [run.activations],
            (*_MODEL_CODE, *activations.CODE),
            bodies.run_activations,
        ),
        Stage(
            "proxies",
            _section("proxies"),
            lambda run: {"checkpoint": run.checkpoint.identity()},
            lambda run: [run.proxies],
            ("rwkvq.proxies", "rwkvq.checkpoint"),
            bodies.run_proxies,
        ),
        Stage(
            "gradients",
            _computed("gradients", "seed"),
            lambda run: {"checkpoint": run.checkpoint.identity()} | _activation_hash(run) | _of(run.windows),
            lambda run: [run.gradients],
            gradients.CODE,
            bodies.run_gradients,
        ),
        Stage(
            "curves",
            _computed("curves"),
            lambda run: (
                {"checkpoint": run.checkpoint.identity(), "gradients": _manifest_hash(run, "gradients")}
                | _activation_hash(run)
            ),
            lambda run: [run.curves],
            curves.CODE,
            blocks.measure_curves,
        ),
        Stage(
            "plan",
            _section("plan", "quantize", "seed"),
            lambda run: {"checkpoint": run.checkpoint.identity()} | _of(run.proxies) | _curves_hash(run),
            lambda run: [run.plan],
            ("rwkvq.plan", "rwkvq.formats"),
            bodies.run_plan,
        ),
        Stage(
            "quantize",
            _computed(),
            lambda run: _of(run.plan) | _activation_hash(run) | _gradient_hash(run),
            lambda run: [run.quantized],
            block.CODE,
            blocks.quantize,
        ),
        Stage(
            "distill",
            _section("distill", "seed"),
            lambda run: (
                {"checkpoint": run.checkpoint.identity(), "quantized": _manifest_hash(run, "quantize")}
                | _of(run.plan, run.windows)
            ),
            lambda run: [run.distilled, run.distillation],
            (*_MODEL_CODE, "rwkvq.distill", "rwkvq.engine.model", "rwkvq.evaluation.logprobs", "rwkvq.formats"),
            bodies.run_distill,
        ),
        Stage(
            "pack",
            _section(*bodies.PROVENANCE_SECTIONS),
            lambda run: (
                {
                    "quantized": _manifest_hash(run, "quantize"),
                    "text": text_hash(run.settings.windows.source),
                    "tokenizer": tokenizer_hash(run.tokenizer_path),
                }
                | _of(run.plan, run.windows)
                | _distilled_hash(run)
            ),
            lambda run: [run.artifact],
            ("rwkvq.artifact", "rwkvq.formats", "rwkvq.checkpoint"),
            bodies.run_pack,
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
            bodies.run_evaluate,
        ),
        Stage(
            "report",
            lambda run: {},
            lambda run: {
                name: _manifest_hash(run, name)
                for name in ("plan", "proxies", "distill", "pack", "evaluate")
                if name in stages_of(run)
            },
            lambda run: [
                run.report,
                run.metrics,
                *(run.folder / name for name in ("report.md", "summary.json", "errors.csv", "quality.csv")),
            ],
            ("rwkvq.report",),
            bodies.run_report,
        ),
    )
}
"""The line, in order."""


def stages_of(run: Run) -> list[str]:
    """The stages this run needs, in order: a policy without statistics needs no windows' activations, and only a run
    that asks for distillation has it.
    """
    policy = run.settings.plan.policy
    without = {"activations"} if policy in ("rtn", "kmeans", "hqq") and not _codebooks(run) else set()
    if policy != "budget":
        without |= {"gradients", "curves"}
    if not run.settings.distill.steps:
        without |= {"distill"}
    return [name for name in STAGES if name not in without]


def _codebooks(run: Run) -> bool:
    return resolve_preset(run.settings.plan, run.settings.quantize).elementwise.format == "vq"
