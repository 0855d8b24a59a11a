"""Commands that run the line: `quantize`, `stage`, `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rwkvq.cli.display import console, print_json, stage_bars, table
from rwkvq.cli.display import size as size_text
from rwkvq.errors import OutputError
from rwkvq.files import recover_folder, remove_leftovers, run_lock
from rwkvq.settings import DISTILL_STEPS, Settings, apply_overrides, load, parse

if TYPE_CHECKING:
    from rwkvq.run import Run

Set = Annotated[list[str] | None, typer.Option("--set", help="Override one setting: section.key=value (repeatable).")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Params = Annotated[Path, typer.Option("--params", help="Settings file.", show_default=True)]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command()(quantize)
    app.command()(stage)
    app.command()(plan)


def quantize(
    model: Annotated[Path, typer.Argument(help=".pth or .safetensors checkpoint, or a folder of shards.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the packed model; must not exist yet.")],
    calibration: Annotated[str, typer.Option(help="Calibration text: .txt, .jsonl, .parquet, or a data set's name.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, or the RWKV World vocabulary (.txt).")],
    bpw: Annotated[
        float | None, typer.Option(help="Stored bits per weight of matrices and LoRA factors, 2 to 8 [default: 3.275].")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of the whole weight file instead, embedding and head too: 1.2GB, 800MiB.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(help="quality, or speed: only those that decode at the speed of memory [default: quality]."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="To compare with: rtn, sq, kmeans, vq, awq, rotation, hqq, residual or rwkvquant [default: budget]."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="text, camera, official or rwkvq: a preset of policy rwkvquant.")
    ] = None,
    distill: Annotated[
        bool,
        typer.Option(
            "--distill", help="Train the vectors that stay in floating point, codes frozen; stores no bit more."
        ),
    ] = False,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Use this plan.json instead of making one.")] = None,
    evaluate_text: Annotated[
        Path | None, typer.Option("--evaluate", help="Text to measure perplexity and KL on.")
    ] = None,
    lambada: Annotated[Path | None, typer.Option(help="LAMBADA-style JSONL to measure on.")] = None,
    workers: Annotated[int, typer.Option(help="Parallel block jobs; 0 = one per core.")] = 0,
    work: Annotated[Path | None, typer.Option(help="Folder for intermediate files [default: OUT.work].")] = None,
    keep_work: Annotated[bool, typer.Option(help="Keep intermediate files after success.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into the folder OUT: the whole line in this process, no server."""
    from rwkvq.plan.plan import Plan
    from rwkvq.publish import check_target

    check_target(out, overwrite=overwrite)
    folder = work or out.with_name(out.name + ".work")
    if plan_file and policy is None and preset is None:
        policy = Plan.read(plan_file).policy
    plan = {"policy": policy, "preset": preset, "formats": formats, "bpw": bpw, "size": size}
    values: dict[str, Any] = {
        "model": str(model),
        "run_dir": str(folder),
        "windows": {"source": calibration, "tokenizer": str(tokenizer)},
        "plan": {key: value for key, value in plan.items() if value is not None},
        "evaluate": {
            "text": str(evaluate_text) if evaluate_text else None,
            "lambada": str(lambada) if lambada else None,
        },
        "distill": {"steps": DISTILL_STEPS if distill else 0},
        "run": {"workers": workers},
    }
    settings = parse(apply_overrides(values, overrides or []), "the command line")
    summary = _run_line(settings, out, plan_file, overwrite=overwrite, keep=keep_work)
    if as_json:
        print_json(summary)


def _run_line(settings: Settings, out: Path, plan_file: Path | None, *, overwrite: bool, keep: bool) -> dict[str, Any]:
    from rwkvq import stages
    from rwkvq.publish import publish
    from rwkvq.report.collect import read_metrics
    from rwkvq.run import Run

    run = Run(settings)
    if out.absolute().is_relative_to(run.folder.absolute()):
        raise OutputError(f"{out}: lies in the work folder {run.folder}; choose another folder for one of them")
    stages.check_inputs(run, plan_file)  # before anything is written
    with run_lock(run.folder):
        remove_leftovers(run.folder)
        recover_folder(out)
        with stage_bars() as bars:
            results = stages.run_line(run, bars, plan_file)
            for result in results:
                if not result.ran:
                    bars.note(result.stage, result.reason)
        publish(run, out, overwrite=overwrite)
        metrics = read_metrics(run.metrics)
        show_summary(run, out)
    if not keep:
        stages.clear_work(run)
    return {"artifact": str(out), "report": str(out / "report.html"), "metrics": metrics}


def show_summary(run: Run, artifact: Path) -> None:
    """Print the closing table of a run and where its results lie."""
    from rwkvq.report.collect import read_summary

    header, rows = read_summary(run)
    console.print()
    console.print(table("Result", header, rows))
    report = artifact / "report.html"
    console.print(f"\nartifact  {artifact}\nreport    {report if report.is_file() else run.report}")


def stage(
    name: Annotated[
        str,
        typer.Argument(
            help="windows, activations, proxies, gradients, curves, plan, quantize, distill, pack, evaluate, report."
        ),
    ],
    params: Params = Path("params.yaml"),
    if_needed: Annotated[
        bool, typer.Option("--if-needed", help="Do nothing where the settings need no such stage.")
    ] = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Run one stage of the line described by the settings file; a stage that is up to date returns at once."""
    from rwkvq.run import Run
    from rwkvq.stages import STAGES, StageResult, run_stage, stages_of

    if name not in STAGES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(STAGES)}", param_hint="NAME")
    run = Run(load(params, overrides or []))
    if if_needed and name not in stages_of(run):
        why = "distill.steps is 0" if name == "distill" else f"policy {run.settings.plan.policy} does not need it"
        result = StageResult(name, False, why, 0.0)
        if not as_json:
            console.print(f"{name}: {result.reason}")
    else:
        with run_lock(run.folder), stage_bars() as bars:
            remove_leftovers(run.folder)
            result = run_stage(run, name, bars(name))
            if not result.ran:
                bars.note(name, result.reason)
    if as_json:
        print_json({"stage": name, "ran": result.ran, "reason": result.reason, "seconds": round(result.seconds, 2)})


def plan(
    params: Params = Path("params.yaml"),
    model: Annotated[Path | None, typer.Option(help="Plan for this checkpoint instead of the settings' model.")] = None,
    diff: Annotated[Path | None, typer.Option("--diff", help="Show how this plan.json differs from the plan.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this file, to be edited.")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Dry run: what would run and why, the format of every tensor, exact bits, estimated seconds and memory."""
    from rwkvq.dry_run import dry_run
    from rwkvq.plan.plan import Plan
    from rwkvq.plan.plan import diff as plan_diff
    from rwkvq.run import Run

    settings = load(params, [*([f"model={model}"] if model else []), *(overrides or [])])
    preview = dry_run(Run(settings))
    if out:
        preview.plan.write(out)
    if diff:
        differences = plan_diff(Plan.read(diff), preview.plan)
        if as_json:
            print_json([str(item) for item in differences])
        else:
            for item in differences:
                console.print(str(item), markup=False)
            console.print(f"{len(differences)} differences")
        return
    if as_json:
        print_json(preview.to_json())
        return
    console.print(table("Stages", ("stage", "runs", "seconds", "why"), preview.stage_rows()))
    console.print()
    console.print(table("Tensors", preview.FORMAT_HEADER, preview.format_rows()))
    console.print()
    console.print(table("Bits", ("quantity", "value"), preview.bit_rows()))
    without = "" if settings.run.device == "cpu" else " without the GPU (what it saves is not estimated)"
    console.print(
        f"\nestimated {preview.seconds:.0f} s on {preview.workers} workers{without}, "
        f"peak memory about {size_text(preview.peak_bytes)}, disk {size_text(preview.disk_bytes)}"
    )
