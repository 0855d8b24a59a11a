"""Tables of the page, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from rwkvq.ablations.results import ResultRow
from rwkvq.ablations.statistics import Interval, Spread, leak_gain, spreads, transfers
from rwkvq.report.text import bits_text, percent_text, seconds_text

Block = str
"""A table or a sentence in Markdown."""
REFERENCE = "preset-rwkvq"
"""What the methods of E14 are compared with."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Block:
    """A table, first column left-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def kl_text(rows: Sequence[ResultRow]) -> str:
    """KL of one setting: mean and range over seeds, or one seed with its standard error over windows."""
    values = [row.kl for row in rows if row.kl is not None]
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.4f} ± {rows[0].kl_se or 0.0:.4f}"
    return f"{mean(values):.4f} ({min(values):.4f}–{max(values):.4f})"


def grouped(rows: Sequence[ResultRow]) -> dict[str, dict[str, list[ResultRow]]]:
    """Rows by setting and model, in order."""
    found: dict[str, dict[str, list[ResultRow]]] = {}
    for row in rows:
        found.setdefault(row.setting, {}).setdefault(row.model, []).append(row)
    return found


def quality_block(rows: Sequence[ResultRow], *, of_body: bool = False) -> Block:
    """Every setting: share of SQ, stored bits (of the matrices, or of the body) and KL of every model."""
    models = list(dict.fromkeys(row.model for row in rows))
    names = ("SQ", "body bits" if of_body else "bits", "KL")
    header = ["setting", *(f"{model} {name}" for model in models for name in names)]
    lines = []
    for setting, by_model in grouped(rows).items():
        line = [setting]
        for model in models:
            own = by_model.get(model, [])
            shares = [row.sq_share for row in own if row.sq_share is not None]
            stored = [row.body_bits if of_body else row.matrix_bits for row in own]
            bits = [value for value in stored if value is not None]
            line += [
                percent_text(mean(shares)) if shares else "",
                bits_text(mean(bits)) if bits else "",
                kl_text(own),
            ]
        lines.append(line)
    return markdown_table(header, lines)


def figure_block(rows: Sequence[ResultRow], names: Mapping[str, str], form: str) -> Block:
    """Figures of rows without a measurement: mean over seeds, a column a model and figure."""
    models = list(dict.fromkeys(row.model for row in rows))
    header = ["", *(f"{model} {title}" for model in models for title in names.values())]
    lines = []
    for setting, by_model in grouped(rows).items():
        line = [setting]
        for model in models:
            for name in names:
                values = [row.figure(name) for row in by_model.get(model, []) if name in row.figures]
                line.append(format(mean(values), form) if values else "")
        lines.append(line)
    return markdown_table(header, lines)


def leak_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    """E1: nats a word on both halves of LAMBADA, less the float model's, by calibration text."""
    names = {"first": "first half", "second": "second half", "nll": "all"}
    sentence = "Nats a last word; calibration `leak-first` and `leak-second` is on that half, `leak-books` on books."
    gains = []
    for model in dict.fromkeys(row.model for row in rows):
        by = {(row.setting, row.seed): row.word_logprobs for row in rows if row.model == model}
        seeds = sorted({seed for _, seed in by})
        found = leak_gain([(by[_leak("first"), seed], by[_leak("second"), seed]) for seed in seeds])
        gains.append(
            f"{model}: last words of passages that were calibrated on gain {found.mean:+.4f} nats over the same words "
            f"under calibration on the other half ({_interval(found, '+.4f')})."
        )
    return [sentence, figure_block(rows, names, ".4f"), " ".join(gains)]


def _leak(half: str) -> str:
    return f"leak-{half} on lambada"


def proxy_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    """E5, E6: quality, and rank correlations with the logarithm of the errors' ratio."""
    measured = [row for row in rows if row.kl is not None]
    correlations = [row for row in rows if row.kl is None]
    names = {"weight": "weight error", "output": "output error"}
    sentence = "Rank correlation with log(error of SQ / error of VQ) over matrices; positive: VQ where it is large."
    return [quality_block(measured), sentence, figure_block(correlations, names, "+.2f")]


def transfer_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    """E8: the setting that is best for the other models against the own best one."""
    blocks = []
    for rule, title in (("fixed", "tau_c / tau_f"), ("percentile", "C, F")):
        found = transfers([row for row in rows if row.parameters["rule"] == rule])
        lines = [
            [item.model, item.chosen, f"{item.kl:.4f}", item.best, f"{item.best_kl:.4f}", f"{item.loss:+.1%}"]
            for item in found
        ]
        header = ["model", f"{title} of the others", "KL", "own best", "KL", "loss"]
        blocks.append(markdown_table(header, lines) if lines else f"{title}: needs two models.")
    return blocks


def samples_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    """E13: KL on other text and on own windows, and last words."""
    words = [row for row in rows if row.text == "lambada"]
    return [
        quality_block([row for row in rows if row.kl is not None]),
        "Nats a last word of LAMBADA:",
        figure_block(words, {"nll": "nats", "accuracy": "accuracy"}, ".4f"),
    ]


def spread_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    """E14: mean and range over seeds, bootstrap interval over windows, difference from the reference method."""
    blocks = []
    for model in dict.fromkeys(row.model for row in rows):
        found = spreads([row for row in rows if row.model == model], REFERENCE)
        header = [model, "seeds", "KL", "range", "95 % interval", f"less {REFERENCE}", "95 % interval"]
        blocks.append(markdown_table(header, [_spread_row(item) for item in found]))
    return blocks


def _spread_row(item: Spread) -> list[str]:
    difference = item.difference
    spread = f"{min(item.values):.4f}–{max(item.values):.4f}" if len(item.values) > 1 else ""
    return [
        item.setting,
        str(len(item.values)),
        f"{mean(item.values):.4f}",
        spread,
        _interval(item.interval, ".4f"),
        "" if difference is None else f"{difference.mean:+.4f}",
        "" if difference is None else _interval(difference, "+.4f"),
    ]


def _interval(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"


def cost_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    """E16: seconds of the stages that decide the cost, and nanoseconds a matrix weight of stage quantize."""
    stages = ("activations", "proxies", "gradients", "curves", "quantize", "pack")
    lines = []
    for row in rows:
        seconds = [row.figures.get(stage) for stage in stages]
        each = row.figures.get("quantize", 0.0) / row.figure("matrix_weights") * 1e6
        texts = ["" if value is None else seconds_text(value) for value in seconds]
        lines.append([f"{row.model} {row.setting}", *texts, f"{each:.1f}"])
    sentence = (
        "Wall times on a shared machine with two cores; stages before `plan` are shared by all lines of a model. "
        "Peak memory is not recorded by the stages: [scale](scale.md)."
    )
    return [sentence, markdown_table(["line", *stages, "quantize, us a weight"], lines)]


def architecture_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    """E18: quartiles of both proxies by class and gap mode."""
    names = {"p_c_median": "P_c", "p_c_max": "P_c max", "p_f_median": "P_f", "passing": "P_c < 1.5, P_f < 50"}
    return [figure_block(rows, names, ".3g")]


def recurrence_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    """E20: quality, and KL by position in long windows."""
    long = [row for row in rows if row.text == "long"]
    lines = [
        [f"{row.model} {row.setting} seed {row.seed}", *(f"{value:.4f}" for value in row.kl_by_position)]
        for row in long
    ]
    count = max((len(row.kl_by_position) for row in long), default=0)
    header = ["eighths of a long window", *(str(index + 1) for index in range(count))]
    quality = quality_block([row for row in rows if row.text != "long"], of_body=True)
    return [quality, markdown_table(header, lines)]


def elementwise_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    """E9: quality at the bits of the body, which hold the element-wise weights."""
    return [quality_block(rows, of_body=True)]


TABLES: Mapping[str, Callable[[Sequence[ResultRow]], list[Block]]] = {
    "E1": leak_blocks,
    "E5": proxy_blocks,
    "E6": proxy_blocks,
    "E8": transfer_blocks,
    "E9": elementwise_blocks,
    "E13": samples_blocks,
    "E14": spread_blocks,
    "E16": cost_blocks,
    "E18": architecture_blocks,
    "E20": recurrence_blocks,
}
"""What differs from one table of quality, by experiment."""
