"""The report's figures as rows of text, for the terminal, Markdown and the page, and as numbers for metrics.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rwkvq.report.data import Budget, Estimate, QualityRow, ReportData, TensorRow
from rwkvq.report.text import (
    NONE,
    bits_text,
    count_text,
    error_percent_text,
    estimate_text,
    number_text,
    percent_text,
    seconds_text,
    shared_decimals,
    size_text,
)


@dataclass(frozen=True, slots=True)
class Table:
    """Text cells under `columns`; `align` has one `l` or `r` a column, `strong` names the columns to stress."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of bytes in the artifact; weights 0 for what is no weight."""

    name: str
    key: str
    weights: int
    stored_bits: int


_ESTIMATES: tuple[tuple[str, str, float], ...] = (
    ("text perplexity", "perplexity", 1),
    ("KL, nats a token", "kl", 1),
    ("top-1 agreement, %", "top1", 100),
    ("LAMBADA perplexity", "lambada_perplexity", 1),
    ("LAMBADA accuracy, %", "lambada_accuracy", 100),
)
"""Label, attribute of QualityRow, factor."""


def estimate_of(row: QualityRow, key: str) -> Estimate | None:
    """The estimate in the attribute `key` of a model."""
    value: Estimate | None = getattr(row, key)
    return value


def estimate_cells(rows: Sequence[QualityRow], key: str, factor: float) -> list[str]:
    """One cell a model, all with the same decimals, so that they can be compared digit by digit."""
    estimates = [estimate_of(row, key) for row in rows]
    decimals = shared_decimals(estimates, factor=factor)
    return [estimate_text(item, factor=factor, decimals=decimals) for item in estimates]


def quality_table(report: ReportData) -> Table:
    """One row a measure, one column a model; measures that nobody has are left out."""
    models = report.quality
    rows = [
        ("file size", [size_text(row.file_bytes) for row in models]),
        ("matrix bits", [bits_text(row.matrix_bits) for row in models]),
        ("body bits", [bits_text(row.body_bits) for row in models]),
        ("file bits", [bits_text(row.file_bits) for row in models]),
    ]
    rows += [(label, estimate_cells(models, key, factor)) for label, key, factor in _ESTIMATES]
    rows.insert(6, ("KL, 99th percentile", [number_text(row.kl_p99) for row in models]))
    shown = tuple((label, *cells) for label, cells in rows if any(text != NONE for text in cells))
    strong = frozenset(at + 1 for at, row in enumerate(models) if row.role == "quantized")
    return Table(("measure", *(row.name for row in models)), shown, "l" + "r" * len(models), strong)


def summary_rows(report: ReportData) -> list[dict[str, str]]:
    """The quality table as one mapping a row, keyed by `measure` and the names of the models."""
    table = quality_table(report)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def bits_table(report: ReportData) -> Table:
    """Every way to count bits per weight, and what each one counts (docs/method.md 8)."""
    sizes = report.sizes
    rows = (
        (
            "nominal, mean over matrices",
            sizes.nominal_by_count,
            "code and scale bits of the published formulas; every matrix counts once, whatever its size",
        ),
        ("nominal, mean over weights", sizes.nominal_by_weights, "the same formulas; every weight counts once"),
        (
            "matrix bits",
            sizes.matrix_bits,
            "stored bits of the quantized matrices and LoRA factors: codes, scales, zero points, codebooks, padding",
        ),
        (
            "body bits",
            sizes.body_bits,
            "everything stored except embedding and head, over all weights except these; unquantized vectors included",
        ),
        (
            "file bits",
            sizes.file_bits,
            f"8 × {sizes.file_bytes:,} bytes of weight files, headers included, over all {sizes.weights:,} weights",
        ),
    )
    return Table(
        ("measure", "bits per weight", "what is counted"),
        tuple((name, bits_text(bits), what) for name, bits, what in rows),
        "lrl",
    )


def _part_of(row: TensorRow) -> tuple[str, str]:
    if row.name in ("emb.weight", "head.weight"):
        return ("embedding", "emb") if row.name == "emb.weight" else ("head", "head")
    return {
        "matrix": ("matrices", "matrix"),
        "lora": ("LoRA factors", "lora"),
        "elementwise": ("element-wise", "elementwise"),
        "keep": ("norms, biases", "keep"),
    }[row.weight_class]


def parts(report: ReportData) -> list[Part]:
    """What the bytes of the weight files are, in a fixed order; headers and alignment are the remainder."""
    order = ("matrix", "lora", "elementwise", "keep", "emb", "head")
    found: dict[str, Part] = {}
    for row in report.tensors:
        name, key = _part_of(row)
        old = found.get(key, Part(name, key, 0, 0))
        found[key] = Part(name, key, old.weights + row.numel, old.stored_bits + row.stored_bits)
    result = [found[key] for key in order if key in found]
    rest = 8 * report.sizes.file_bytes - sum(part.stored_bits for part in result)
    return [*result, Part("headers, alignment", "rest", 0, rest)] if rest > 0 else result


def parts_table(report: ReportData) -> Table:
    """The parts of the weight files: weights, bytes, share and bits of each."""
    everything = 8 * report.sizes.file_bytes
    rows = tuple(
        (
            part.name,
            count_text(part.weights) if part.weights else NONE,
            size_text(round(part.stored_bits / 8)),
            percent_text(part.stored_bits / everything) if everything else NONE,
            bits_text(part.stored_bits / part.weights if part.weights else None),
        )
        for part in parts(report)
    )
    return Table(("part", "weights", "bytes", "share", "bits"), rows, "lrrrr")


def tensor_table(rows: Iterable[TensorRow]) -> Table:
    """One row a weight; relative errors in percent."""
    cells = tuple(
        (
            row.name,
            row.weight_class,
            row.format if row.format == row.method else f"{row.format} / {row.method}",
            count_text(row.numel),
            bits_text(row.bits),
            error_percent_text(row.relative_error),
            row.reason,
        )
        for row in rows
    )
    return Table(("tensor", "class", "format / method", "weights", "bits", "error, %", "reason"), cells, "lllrrrl")


def budget_sentences(report: ReportData) -> list[str]:
    """What policy `budget` was asked for, what it expected and what was measured; none for another policy."""
    budget, measured = report.budget, report.quality_of("quantized")
    if budget is None:
        return []
    formats = Counter(row.format for row in report.tensors if row.method in ("trellis", "table"))
    found = "" if measured is None or measured.kl is None else f", measured {estimate_text(measured.kl)}"
    return [
        f"Divergence from the float model, nats a token: predicted {number_text(budget.predicted_kl)}{found}.",
        f"Asked for {budget.target}, formats {budget.formats}; bits go where the loss depends on them. "
        f"Matrices and LoRA factors: {', '.join(f'{count} {name}' for name, count in sorted(formats.items()))}. "
        "The reason for each is in the table of tensors.",
        *_price_of_groups(budget),
    ]


def _price_of_groups(budget: Budget) -> list[str]:
    free = budget.predicted_kl_without_groups
    if not free:
        return []
    said = f"Launch groups by {budget.launch_groups}: weights that one kernel call can decode have one format and rate"
    return [f"{said}: {percent_text(budget.predicted_kl / free - 1)} above the {number_text(free)} predicted without."]


def distillation_sentences(report: ReportData) -> list[str]:
    """What distillation gained on the windows that it was judged by; none without it."""
    done = report.distillation
    if done is None:
        return []
    ratio = done.after / done.before if done.before else 1.0
    seconds = next((stage.seconds for stage in report.stages if stage.name == "distill"), None)
    cost = "" if seconds is None else f" It took {seconds_text(seconds)}."
    return [
        f"KL on the held-out calibration windows, nats a token: {number_text(done.before)} before, "
        f"{number_text(done.after)} after, {ratio:.3f} of it.{cost}",
        f"{done.vectors} vectors that stay in floating point were trained towards the float model with all codes "
        f"frozen, values of step {done.step}; nothing more is stored. Steps were chosen on these windows: the figures "
        "on other text are the ones to trust.",
    ]


def disjointness_sentences(report: ReportData) -> list[str]:
    """One sentence an evaluation set: was any of it calibrated on?"""
    return [
        f"{proof.name}: none of its {proof.positions:,} runs of {proof.size} tokens occurs in the calibration windows."
        if proof.shared == 0
        else f"{proof.name}: {proof.shared:,} of its {proof.positions:,} runs of {proof.size} tokens occur in the "
        "calibration windows; its figures are too good."
        for proof in report.disjointness
    ]


def measured_on(report: ReportData) -> list[str]:
    """Sentences that name texts, windows, tokens and examples behind the figures."""
    sentences = []
    if (used := report.calibration) is not None:
        sentences.append(
            f"Calibrated on {used.windows} windows of {used.length} tokens ({used.windows * used.length:,} tokens) "
            f"of {used.source}, seed {used.seed}; {used.held_out} more windows held out."
        )
    if (run := report.evaluation) is not None and run.text is not None:
        total = run.windows * run.length
        sentences.append(
            f"Perplexity, KL and top-1 over {total:,} predictions: {run.windows} windows of {run.length} tokens of "
            f"{run.text}; ± is the standard error over windows. All models saw the same windows, "
            "so their differences are known better than ± suggests."
        )
    if run is not None and run.lambada is not None:
        sentences.append(
            f"LAMBADA over {run.lambada_examples:,} examples of {run.lambada}, token 0 prepended; ± is the standard "
            "error over examples."
        )
    return sentences


def model_sentence(report: ReportData) -> str:
    """The model and the recipe in one line."""
    spec = report.spec
    version = {"x060": "RWKV-6", "x070": "RWKV-7"}.get(spec.version, spec.version)
    recipe = f"policy {report.policy}" + (f", preset {report.preset}" if report.preset else "")
    return (
        f"{version} · {spec.layers} blocks · width {spec.width} · {count_text(report.sizes.weights)} weights · {recipe}"
    )


def stage_table(report: ReportData) -> Table:
    """Wall time of every stage and their sum."""
    rows = [(stage.name, "reused" if stage.reused else seconds_text(stage.seconds)) for stage in report.stages]
    total = sum(stage.seconds for stage in report.stages)
    return Table(("stage", "wall time"), (*rows, ("total", seconds_text(total))), "lr")


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested plain values as (dotted name, text) in their own order."""
    if isinstance(value, Mapping):
        items: Sequence[tuple[object, Any]] = list(value.items())
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        items = list(enumerate(value))
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else NONE if value is None else str(value)
        return [(prefix, text)]
    return [pair for key, item in items for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))]


def metrics(report: ReportData) -> dict[str, Any]:
    """The figures of metrics.json: no times, no host, only finite numbers, so that equal runs give equal bytes."""
    sizes = {item.name: getattr(report.sizes, item.name) for item in fields(report.sizes)}
    quality: dict[str, dict[str, float]] = {}
    for row in report.quality:
        values: dict[str, float] = {}
        for item in fields(row):
            value = getattr(row, item.name)
            if isinstance(value, Estimate):
                values[item.name] = value.value
                if value.error is not None:
                    values[f"{item.name}_se"] = value.error
            elif isinstance(value, int | float):
                values[item.name] = value
        quality[row.name] = {name: value for name, value in values.items() if math.isfinite(value)}
    return {"sizes": {name: value for name, value in sizes.items() if value is not None}, "quality": quality}
