"""The page of a study: one section an experiment, made from the rows alone, and the table and figures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rwkvq.ablations.experiments import EXPERIMENTS
from rwkvq.ablations.figures import CHARTS, svg
from rwkvq.ablations.results import ResultRow, of_experiment, read_rows, write_rows
from rwkvq.ablations.study import Study
from rwkvq.ablations.tables import TABLES, Block, quality_block
from rwkvq.files import write_text

PREAMBLE = """# Ablations

Made by `python -m flows.ablations` from [{table}]({table}); what it means: [evidence](../docs/evidence.md).
KL: nats a token from the float model, on evaluation text that no choice was made on; with several seeds of the
calibration windows the mean and the range over seeds, for one seed ± one standard error over windows. Bits: all
stored bits a weight of matrices and LoRA factors; SQ: share of their weights that are scalar. A mix takes every
weight from the packed artifact of policy `sq` or that of policy `vq`. Not run: E15 (speed of kernels) and E19
(activation quantization).
"""


def collect(study: Study) -> list[ResultRow]:
    """All rows that experiments in the study's folder have written, also in earlier runs, in order of the experiments.

    Raises EvaluationError for a damaged file.
    """
    files = (study.folder / "rows").glob("*.parquet") if (study.folder / "rows").is_dir() else ()
    rows = [row for path in sorted(files) for row in read_rows(path)]
    place = {key: index for index, key in enumerate(EXPERIMENTS)}
    models: dict[str, int] = {name: index for index, name in enumerate(study.order or study.models)}
    return sorted(
        rows, key=lambda row: (place[row.experiment], models.get(row.model, len(models)), row.model, row.seed)
    )


def publish(study: Study, page: Path | None) -> str:
    """Write table, figures and page into the study's folder and, if `page` is given, there; return the page's text."""
    rows = collect(study)
    for path in filter(None, (study.folder / "ablations.md", page)):
        write_rows(path.with_suffix(".parquet"), rows)
        for key, picture in figures(rows).items():
            write_text(path.parent / "figures" / f"{key}.svg", picture)
        write_text(path, markdown(rows, f"{path.stem}.parquet"))
    return markdown(rows, "ablations.parquet")


def figures(rows: Sequence[ResultRow]) -> dict[str, str]:
    """SVG documents by the key of their experiment."""
    found = {key: of_experiment(rows, key) for key in CHARTS}
    return {f"ablation-{key}": svg(CHARTS[key](own)) for key, own in found.items() if own}


def markdown(rows: Sequence[ResultRow], table: str) -> str:
    """The page; experiments without rows are left out."""
    parts = [PREAMBLE.format(table=table)]
    for key, experiment in EXPERIMENTS.items():
        own = [row for used in experiment.uses or (key,) for row in of_experiment(rows, used)]
        if own:
            parts.append(f"## {key}: {experiment.title}\n\n{experiment.question} {measured_on(own)}\n")
            parts += [f"{block}\n" for block in _blocks(key, own)]
            if key in CHARTS:
                parts.append(f"![{experiment.title}](figures/ablation-{key}.svg)\n")
    return "\n".join(parts)


def measured_on(rows: Sequence[ResultRow]) -> str:
    """Models, seeds and tokens of some rows, in a sentence."""
    models = ", ".join(dict.fromkeys(row.model for row in rows))
    seeds = ", ".join(map(str, sorted({row.seed for row in rows})))
    tokens = {row.text: row.tokens for row in rows if row.tokens and row.text != "calibration"}
    names = {"text": "tokens of text", "long": "tokens of text in long windows", "lambada": "target tokens of LAMBADA"}
    said = ", ".join(f"{count} {names[text]}" for text, count in tokens.items())
    return f"{models}; seeds {seeds}" + (f"; {said}." if said else ".")


def _blocks(key: str, rows: Sequence[ResultRow]) -> list[Block]:
    if key in TABLES:
        return TABLES[key](rows)
    return [quality_block([row for row in rows if row.kl is not None])]
