"""Commands that look and change nothing: `inspect`, `verify`, `compare`, `evaluate`, `lm-eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rwkvq.cli.display import console, print_json, stage_bars, table

if TYPE_CHECKING:
    from rwkvq.artifact.reader import Artifact
    from rwkvq.artifact.verify import VerifyReport
    from rwkvq.deep_verify import DeepReport

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command()(inspect)
    app.command()(verify)
    app.command()(compare)
    app.command()(evaluate)
    app.command(
        "lm-eval",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )(lm_eval)


def inspect(
    path: Annotated[Path, typer.Argument(help="An artifact folder or a checkpoint.")],
    tensors: Annotated[bool, typer.Option(help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint or an artifact holds: version, sizes, formats, bits."""
    from rwkvq.artifact.reader import Artifact
    from rwkvq.engine.model import open_model

    source = open_model(path)
    values = {"path": str(path), "kind": "artifact" if isinstance(source, Artifact) else "checkpoint"}
    facts: dict[str, Any] = values | source.spec.to_json()
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    if isinstance(source, Artifact):
        facts |= _artifact_facts(source)
        header = ("tensor", "format", "method", "bits/weight", "relative error", "why")
        rows = [
            (
                entry.name,
                entry.layout.format,
                entry.method,
                f"{entry.stored_bits / entry.numel:.3f}",
                _error_text(source.errors.get(entry.name)),
                entry.reason,
            )
            for entry in source.plan.tensors
        ]
    else:
        header = ("tensor", "shape", "dtype")
        rows = [(name, str(list(source.shape(name))), str(source.dtype(name))) for name in source.names()]
    if as_json:
        print_json(facts | {"tensors": [dict(zip(header, row, strict=True)) for row in rows]})
        return
    console.print(table(str(path), ("quantity", "value"), [(key, _text(value)) for key, value in facts.items()]))
    if tensors:
        console.print()
        console.print(table("Tensors", header, rows))


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _error_text(error: dict[str, float | None] | None) -> str:
    value = None if error is None else error.get("output_error")
    return "" if value is None else f"{value:.4f}"


def _artifact_facts(artifact: Artifact) -> dict[str, Any]:
    from rwkvq.plan.bits import totals

    bits = totals(artifact.plan)
    return {
        "policy": artifact.plan.policy,
        "preset": artifact.plan.preset,
        "matrix_bits": bits.matrix_bits,
        "body_bits": bits.body_bits,
        "file_bytes": artifact.file_bytes,
        "file_bits": 8 * artifact.file_bytes / bits.weights,
    }


def verify(
    path: Annotated[Path, typer.Argument(help="An artifact folder.")],
    deep: Annotated[
        Path | None, typer.Option(help="Float checkpoint: prove provenance too, and quantize one tensor again.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Calibration text of --deep [default: the path in the artifact].")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Run folder whose activations --deep uses [default: computes them].")
    ] = None,
    shared: Annotated[Path | None, typer.Option(help="The same for a folder that runs of one model share.")] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses the tensor of --deep [default: another each time].")] = None,
    tensor: Annotated[str | None, typer.Option(help="Quantize this tensor again instead of a random one.")] = None,
    as_json: Json = False,
) -> None:
    """Prove that an artifact is whole: checksums, structure, every tensor decodes, stored bits as stated."""
    given = {"--calibration": calibration, "--work": work, "--shared": shared, "--seed": seed, "--tensor": tensor}
    unused = [name for name, value in given.items() if value is not None and deep is None]
    if unused:
        raise typer.BadParameter(f"{', '.join(unused)}: only with --deep MODEL")
    if work is not None and shared is not None:
        raise typer.BadParameter("give --work or --shared, not both")
    from rwkvq.artifact.reader import open_artifact
    from rwkvq.artifact.verify import verify as verify_artifact
    from rwkvq.deep_verify import Evidence, deep_verify

    proof = None
    with stage_bars() as bars:
        report = verify_artifact(path, bars("decode"))
        if deep is not None:
            folder = work or shared
            evidence = Evidence(deep, calibration, folder and folder / "activations", tensor, seed)
            proof = deep_verify(open_artifact(path, checksums=False), evidence, bars)
    if as_json:
        print_json(asdict(report) | {"path": str(report.path)} | ({"deep": proof.to_json()} if proof else {}))
        return
    _show_report(report)
    if proof is not None:
        _show_proof(proof)


def _show_report(report: VerifyReport) -> None:
    console.print(f"[green]✓[/] {len(report.files)} files have the listed checksums")
    console.print(f"[green]✓[/] {report.tensors} tensors, {report.weights:,} weights decode to finite values")
    console.print(f"[green]✓[/] {report.stored_bits:,} stored bits, as the plan states")
    if report.unlisted:
        console.print(f"[yellow]![/] files that are not listed: {', '.join(report.unlisted)}")


def _show_proof(proof: DeepReport) -> None:
    console.print(f"[green]✓[/] {proof.kept} kept weights have the checkpoint's bytes")
    if proof.distilled:
        console.print(f"[green]✓[/] {proof.distilled} distilled vectors have the bytes that distillation gives again")
    if proof.tensor is None:
        console.print("[green]✓[/] no weight is quantized, so none had to be quantized again")
    else:
        chosen = "named" if proof.seed is None else f"chosen by --seed {proof.seed}"
        console.print(
            f"[green]✓[/] {proof.tensor} ({chosen}) quantized again by {proof.method}, activations "
            f"{proof.activations}: {proof.parts} parts, {proof.bytes:,} bytes, all equal",
            highlight=False,
        )
    rows = [
        (check.what, (check.recorded or "none")[:16], (check.found or "none")[:16], "yes" if check.is_same else "NO")
        for check in proof.checks
    ]
    console.print()
    console.print(table("Provenance", ("made from", "recorded", "here", "same"), rows))
    changed = [check.what for check in proof.checks if not check.is_same]
    if changed:
        console.print(
            f"[yellow]![/] {', '.join(changed)}: not as recorded; other weights than those compared may come out with "
            "other bytes here"
        )


def compare(
    first: Annotated[Path, typer.Argument(help="An artifact folder.")],
    second: Annotated[Path, typer.Argument(help="Another artifact folder.")],
    as_json: Json = False,
) -> None:
    """Put two artifacts side by side: bytes, bits, errors, and every tensor that is stored differently."""
    from rwkvq.artifact.reader import open_artifact
    from rwkvq.plan.plan import diff

    artifacts = [open_artifact(path) for path in (first, second)]
    facts = [_artifact_facts(artifact) for artifact in artifacts]
    means = [_mean_error(artifact) for artifact in artifacts]
    differences = [str(item) for item in diff(artifacts[0].plan, artifacts[1].plan)]
    if as_json:
        print_json({"first": facts[0] | means[0], "second": facts[1] | means[1], "differences": differences})
        return
    merged = [fact | mean for fact, mean in zip(facts, means, strict=True)]
    names = dict.fromkeys([*merged[0], *merged[1]])
    rows = [(key, _text(merged[0].get(key, "")), _text(merged[1].get(key, ""))) for key in names]
    console.print(table("Comparison", ("quantity", str(first), str(second)), rows))
    console.print()
    for item in differences:
        console.print(item, markup=False)
    console.print(f"{len(differences)} differences")


def _mean_error(artifact: Artifact) -> dict[str, float]:
    errors = [error["output_error"] for error in artifact.errors.values() if error.get("output_error") is not None]
    return {"mean_output_error": sum(errors) / len(errors)} if errors else {}


def evaluate(
    model: Annotated[Path, typer.Argument(help="An artifact folder or a checkpoint.")],
    text: Annotated[Path | None, typer.Option(help="Text for perplexity (and KL with --reference).")] = None,
    lambada: Annotated[Path | None, typer.Option(help='JSONL with one {"text": ...} a line.')] = None,
    reference: Annotated[Path | None, typer.Option(help="Float checkpoint for KL and top-1 agreement.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer file [default: the artifact's].")] = None,
    windows: Annotated[int, typer.Option(help="Text windows.", min=1)] = 64,
    length: Annotated[int, typer.Option(help="Tokens a window.", min=2)] = 512,
    limit: Annotated[int | None, typer.Option(help="LAMBADA examples [default: all].")] = None,
    as_json: Json = False,
) -> None:
    """Measure text perplexity, KL and top-1 against a float model, and LAMBADA."""
    if text is None and lambada is None:
        raise typer.BadParameter("give --text, --lambada or both")
    from rwkvq.evaluation.line import evaluate_model

    with stage_bars() as bars:
        result = evaluate_model(
            model,
            reference=reference,
            text=text,
            lambada_file=lambada,
            tokenizer=tokenizer,
            windows=windows,
            length=length,
            limit=limit,
            progress=bars("evaluate"),
        )
    if as_json:
        print_json(result)
        return
    rows = [(key, _text(value)) for part in result.values() for key, value in part.items() if value is not None]
    console.print(table(str(model), ("measure", "value"), rows))


def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command line with the model `rwkvq`: run --model rwkvq --model_args path=DIR --tasks ..."""
    from rwkvq.evaluation.harness import main

    main(context.args)
