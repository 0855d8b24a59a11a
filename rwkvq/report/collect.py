"""From the files of a run to what its report shows."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkvq.artifact.reader import open_artifact
from rwkvq.calibration import windows
from rwkvq.distill.outputs import read_curve
from rwkvq.documents import read_json
from rwkvq.errors import EvaluationError, PlanError
from rwkvq.evaluation.line import QUANTIZED
from rwkvq.files import write_json, write_text
from rwkvq.plan.bits import totals
from rwkvq.plan.plan import Plan, PlannedTensor
from rwkvq.proxies import table
from rwkvq.report import html, markdown, tables
from rwkvq.report.data import (
    Arm,
    Budget,
    Calibration,
    Disjointness,
    Distillation,
    Estimate,
    Evaluation,
    ProxyPlane,
    ProxyRow,
    QualityRow,
    ReportData,
    Role,
    Sizes,
    StageTime,
    TensorRow,
)
from rwkvq.run import LINE, Run
from rwkvq.settings import GapMode

Values = dict[str, Any]

ARMS: Mapping[str, Arm] = {"scalar": "sq", "vector": "vq", "affine": "sq", "residual": "vq"}
"""The arm a matrix went to, by its format."""


def collect_report(run: Run, plan: Plan, seconds: dict[str, float]) -> ReportData:
    """Read a finished run; parts that were not run (evaluation without texts) are left out."""
    artifact = open_artifact(run.artifact)
    evaluation = _read_json(run.evaluation / "evaluation.json")
    return ReportData(
        model=run.model_path.stem,
        spec=plan.spec,
        policy=plan.policy,
        preset=plan.preset if plan.policy == "rwkvquant" else "",
        sizes=_sizes(run, plan, artifact.file_bytes),
        quality=_quality(run, plan, evaluation),
        evaluation=_evaluation(run, evaluation),
        calibration=_calibration(run),
        disjointness=tuple(
            Disjointness(name, item["positions"], item["shared"], item["size"])
            for name, item in evaluation.get("disjoint", {}).items()
        ),
        budget=_budget(plan),
        distillation=_distillation(run),
        proxies=_proxies(run, plan),
        tensors=tuple(_tensor_row(entry, artifact.errors.get(entry.name)) for entry in plan.tensors),
        stages=tuple(StageTime(name, seconds[name]) for name in LINE[:-1] if name in seconds),
        provenance=_read_json(run.artifact / "provenance.json"),
    )


def _read_json(path: Path) -> Values:
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: missing or damaged; run the stage that writes it again") from error
    if not isinstance(values, dict):
        raise EvaluationError(f"{path}: damaged (no JSON object); run the stage that writes it again")
    return values


def _sizes(run: Run, plan: Plan, file_bytes: int) -> Sizes:
    bits = totals(plan)
    return Sizes(
        checkpoint_bytes=_checkpoint_bytes(run.model_path),
        file_bytes=file_bytes,
        weights=bits.weights,
        nominal_by_count=bits.nominal_by_count,
        nominal_by_weights=bits.nominal_by_weights,
        matrix_bits=bits.matrix_bits,
        body_bits=bits.body_bits,
        file_bits=8 * file_bytes / bits.weights,
    )


def _checkpoint_bytes(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _estimate(values: Values, key: str, error: str | None = None) -> Estimate | None:
    value = values.get(key)
    return None if value is None else Estimate(value, values.get(error or f"{key}_se"))


def _quality(run: Run, plan: Plan, evaluation: Values) -> tuple[QualityRow, ...]:
    rows = []
    order = sorted(evaluation["models"].items(), key=lambda item: (item[0] == QUANTIZED, item[0] != "float", item[0]))
    for name, values in order:
        role: Role = "float" if name == "float" else "quantized" if name == QUANTIZED else "baseline"
        size, bits = _size_of_model(run, plan, name)
        word = values.get("lambada") or {}
        rows.append(
            QualityRow(
                name=plan.policy if role == "quantized" else name,
                role=role,
                file_bytes=size,
                perplexity=_estimate(values, "ppl"),
                kl=_estimate(values, "kl"),
                kl_p99=values.get("kl_p99"),
                top1=_estimate(values, "top1"),
                lambada_perplexity=_estimate(word, "ppl"),
                lambada_accuracy=_estimate(word, "acc"),
                **bits,
            )
        )
    return tuple(rows)


def _size_of_model(run: Run, plan: Plan, name: str) -> tuple[int, dict[str, float | None]]:
    """Bytes of the weight files, and matrix, body and file bits of one model of the comparison."""
    if name == "float":
        source = run.checkpoint
        count = {tensor: source.dtype(tensor).itemsize * 8 for tensor in source.names()}
        numel = {tensor: _numel(source.shape(tensor)) for tensor in source.names()}
        body = [tensor for tensor in count if tensor not in ("emb.weight", "head.weight")]
        body_bits = sum(count[tensor] * numel[tensor] for tensor in body) / sum(numel[tensor] for tensor in body)
        size = _checkpoint_bytes(run.model_path)
        bits: dict[str, float | None] = {
            "matrix_bits": body_bits,
            "body_bits": body_bits,
            "file_bits": 8 * size / sum(numel.values()),
        }
        return size, bits
    folder = run.artifact if name == QUANTIZED else run.evaluation / "baselines" / name
    artifact = open_artifact(folder)
    found = totals(artifact.plan)
    size = artifact.file_bytes
    return size, {
        "matrix_bits": found.matrix_bits,
        "body_bits": found.body_bits,
        "file_bits": 8 * size / found.weights,
    }


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _evaluation(run: Run, evaluation: Values) -> Evaluation | None:
    text, word = evaluation.get("text"), evaluation.get("lambada")
    if text is None and word is None:
        return None
    return Evaluation(
        text=text["source"] if text else None,
        windows=text["windows"] if text else 0,
        length=text["length"] if text else 0,
        lambada=word["source"] if word else None,
        lambada_examples=word["examples"] if word else 0,
    )


def _calibration(run: Run) -> Calibration | None:
    if not run.windows.is_file():
        return None
    used = windows.read_windows(run.windows)
    held_out = int(used.held_out.sum())
    return Calibration(Path(used.source).name, len(used.ids) - held_out, used.ids.shape[1], held_out, used.seed)


def _budget(plan: Plan) -> Budget | None:
    if plan.policy != "budget":
        return None
    decision = plan.decision
    target = f"{decision['bpw']} bits a matrix weight" if "bpw" in decision else f"a weight file of {decision['size']}"
    groups, free = str(decision.get("launch_groups", "none")), decision.get("predicted_kl_without_groups")
    predicted = float(decision["predicted_kl"])
    return Budget(target, str(decision["formats"]), predicted, groups, None if free is None else float(free))


def _distillation(run: Run) -> Distillation | None:
    if not run.settings.distill.steps:
        return None
    curve = read_curve(run.distillation)
    return Distillation(curve["vectors"], curve["before"], curve["after"], curve["step"])


def _proxies(run: Run, plan: Plan) -> ProxyPlane | None:
    decided = {entry.name: entry for entry in plan.tensors}
    mode: GapMode = next((entry.proxies["gap_mode"] for entry in plan.tensors if entry.proxies), "quantile")
    rows = []
    for row in table.read(run.proxies):
        if row.name not in decided:
            raise PlanError(f"{run.proxies}: has a row for {row.name}, which the plan has not; run stage proxies again")
        values, entry = row.measures.of_mode(mode), decided[row.name]
        is_matrix = entry.weight_class in ("matrix", "lora")
        arm = ARMS.get(entry.layout.format) if is_matrix else None
        rows.append(ProxyRow(row.name, row.block, entry.weight_class, entry.numel, values.p_c, values.p_f, arm))
    return ProxyPlane(
        rows=tuple(rows),
        gap_mode=mode,
        decision=", ".join(f"{key} {value}" for key, value in plan.decision.items()) or f"policy {plan.policy}",
        tau_c=plan.thresholds.get("tau_c"),
        tau_f=plan.thresholds.get("tau_f"),
    )


def _tensor_row(entry: PlannedTensor, error: Values | None) -> TensorRow:
    prefix = f"blocks.{entry.block}."
    short = entry.name.removeprefix(prefix).removesuffix(".weight")
    return TensorRow(
        name=entry.name,
        block=entry.block,
        short=short,
        weight_class=entry.weight_class,
        format=entry.layout.format,
        method=entry.method,
        numel=entry.numel,
        stored_bits=entry.stored_bits,
        relative_error=None if error is None else error.get("output_error"),
        reason=entry.reason,
    )


def write_report(report: ReportData, run: Run) -> None:
    """Write report.html, report.md, summary.json, metrics.json, errors.csv and quality.csv of a run."""
    write_text(run.report, html.render(report))
    write_text(run.folder / "report.md", markdown.markdown(report))
    closing = tables.quality_table(report)
    write_json(
        run.folder / "summary.json", {"header": list(closing.columns), "rows": [list(row) for row in closing.rows]}
    )
    write_json(run.metrics, tables.metrics(report))
    write_text(run.folder / "errors.csv", _errors_csv(report))
    write_text(run.folder / "quality.csv", _quality_csv(report))


def _errors_csv(report: ReportData) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("weight", "bits", "output_error"))
    for row in report.tensors:
        if row.relative_error is not None:
            writer.writerow((row.name, f"{row.bits:.4f}", f"{row.relative_error:.6g}"))
    return text.getvalue()


def _quality_csv(report: ReportData) -> str:
    """One row a model whose divergence from the float model was measured: quality against size, for plots."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "file_bytes", "file_bits", "body_bits", "matrix_bits", "kl", "kl_se"))
    for row in report.quality:
        if row.kl is not None:
            sizes = (row.file_bytes, row.file_bits, row.body_bits, row.matrix_bits)
            writer.writerow((row.name, *sizes, row.kl.value, row.kl.error))
    return text.getvalue()


def read_summary(run: Run) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the closing table of a finished run."""
    values = _read_json(run.folder / "summary.json")
    return values["header"], values["rows"]


def read_metrics(path: Path) -> Values:
    """The figures of a finished run."""
    return _read_json(path)


def read_report_markdown(run: Run) -> str:
    """The report of a finished run in Markdown."""
    return (run.folder / "report.md").read_text(encoding="utf-8")
