"""Evaluation as a step of the line: float, baselines and artifact on the same texts, with proof of disjointness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rwkvq.artifact.reader import open_artifact
from rwkvq.artifact.writer import write_artifact
from rwkvq.calibration.disjoint import Overlap, shared_shingles
from rwkvq.calibration.texts import read_texts
from rwkvq.calibration.windows import read_windows
from rwkvq.checkpoint.names import extract, weights_of
from rwkvq.checkpoint.reader import WeightSource, open_checkpoint
from rwkvq.engine.model import Engine, open_model, open_tokenizer
from rwkvq.errors import EvaluationError
from rwkvq.evaluation.divergence import FLOAT, compare_on_text
from rwkvq.evaluation.lambada import lambada, read_examples
from rwkvq.evaluation.memory import engines_for
from rwkvq.evaluation.perplexity import text_windows
from rwkvq.files import Progress, atomic_path, no_progress, write_json
from rwkvq.models.tokenizer import Tokenizer, load_tokenizer
from rwkvq.plan.plan import Plan, PlannedTensor
from rwkvq.plan.policies import make_plan
from rwkvq.proxies import table
from rwkvq.quantize.block import quantize_tensor
from rwkvq.quantize.inputs import NOTHING
from rwkvq.quantize.results import TensorError
from rwkvq.run import Run

QUANTIZED = "quantized"
"""Name of the artifact in the results."""


def evaluate_run(run: Run, progress: Progress = no_progress) -> None:
    """Measure the run's models and write `evaluation.json` and rows by window and by example.

    Raises EvaluationError if an evaluation text shares a run of 32 tokens with the calibration windows.
    """
    settings = run.settings.evaluate
    if not settings.text and not settings.lambada:
        unmeasured: dict[str, Any] = {
            "models": {FLOAT: {}, QUANTIZED: {}},
            "disjoint": {},
            "text": None,
            "lambada": None,
        }
        write_json(run.evaluation / "evaluation.json", unmeasured)
        return
    tokenizer = load_tokenizer(run.tokenizer_path)
    result: dict[str, Any] = {"models": {}, "disjoint": {}, "text": None, "lambada": None}
    engines = _engines(run)
    result["models"] = {name: {} for name in engines}
    if settings.text:
        ids = _text_ids(Path(settings.text), tokenizer, settings.field, settings.windows, settings.length)
        result["text"] = {"windows": len(ids), "length": settings.length, "source": Path(settings.text).name}
        result["disjoint"]["text"] = _proof(run, settings.text, [ids.flatten()])
        others = {name: engine for name, engine in engines.items() if name != FLOAT}
        compared = compare_on_text(engines[FLOAT], others, ids, batch=settings.batch, on_batch=progress)
        for name, text_result in compared.items():
            result["models"][name] |= text_result.to_json()
        _write_rows(run.evaluation / "windows.parquet", {name: item.window_rows() for name, item in compared.items()})
    if settings.lambada:
        examples = read_examples(Path(settings.lambada), settings.lambada_limit)
        result["lambada"] = {"examples": len(examples), "source": Path(settings.lambada).name}
        encoded = [torch.tensor(tokenizer.encode(example)) for example in examples]
        result["disjoint"]["lambada"] = _proof(run, settings.lambada, encoded)
        rows = {}
        for name, engine in engines.items():
            measured = lambada(engine, examples, tokenizer, batch=4 * settings.batch, on_batch=progress)
            result["models"][name]["lambada"] = measured.to_json()
            rows[name] = measured.example_rows()
        _write_rows(run.evaluation / "lambada.parquet", rows)
    write_json(run.evaluation / "evaluation.json", result)


def _engines(run: Run) -> dict[str, Engine]:
    sources: dict[str, WeightSource] = {FLOAT: run.checkpoint}
    for name in run.settings.evaluate.baselines:
        if name != Plan.read(run.plan).policy:
            sources[name] = open_artifact(write_baseline(run, name))
    return engines_for(sources | {QUANTIZED: open_artifact(run.artifact)}, run.settings.evaluate.memory_gb)


def write_baseline(run: Run, policy: str) -> Path:
    """Quantize and pack the model under a policy that needs no statistics; return the artifact's folder."""
    folder = run.evaluation / "baselines" / policy
    choice = run.settings.plan.model_copy(update={"policy": policy})
    source = run.checkpoint
    plan = make_plan(source, table.read(run.proxies), choice, run.settings.quantize, run.settings.seed)
    weights = weights_of(source.spec, {name: source.shape(name) for name in source.names()})
    catalogue = {weight.name: weight for weight in weights}

    def parts(entry: PlannedTensor) -> tuple[dict[str, Tensor], TensorError]:
        weight = extract(source.tensor(entry.tensor), catalogue[entry.name]).float()
        return quantize_tensor(weight, entry, NOTHING)

    write_artifact(
        folder,
        source,
        plan,
        lambda entry: parts(entry)[0],
        {},
        tokenizer=None,
        provenance={"baseline": policy},
        overwrite=True,
    )
    return folder


def _text_ids(path: Path, tokenizer: Tokenizer, field: str, count: int, length: int) -> Tensor:
    if path.suffix not in (".txt", ".jsonl", ".parquet"):
        raise EvaluationError(f"{path}: not a .txt, .jsonl or .parquet file; give evaluation text as one of these")
    text = "\n\n".join(read_texts(str(path), field, Path()))
    return text_windows(text, tokenizer, count, length, where=str(path))


def _proof(run: Run, source: str, sequences: Sequence[Tensor]) -> dict[str, int]:
    if not run.windows.is_file():  # a policy that needs no calibration
        return asdict(Overlap(0, 0, 0))
    overlap = shared_shingles(read_windows(run.windows).ids, [ids.numpy() for ids in sequences])
    if overlap.shared:
        raise EvaluationError(
            f"{source}: {overlap.shared} of {overlap.positions} runs of {overlap.size} tokens also occur in the "
            "calibration windows; evaluate on other text, or calibrate on other text"
        )
    return asdict(overlap)


def _write_rows(path: Path, by_model: Mapping[str, list[dict[str, Any]]]) -> None:
    rows = [{"model": name} | row for name, rows in by_model.items() for row in rows]
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)


def evaluate_model(
    model: Path,
    *,
    reference: Path | None,
    text: Path | None,
    lambada_file: Path | None,
    tokenizer: Path | None,
    windows: int,
    length: int,
    limit: int | None,
    progress: Progress = no_progress,
) -> dict[str, dict[str, Any]]:
    """Measure one model outside any run: {"text": ..., "lambada": ...}, KL and top-1 only with a reference.

    Raises EvaluationError, TextError, TokenizerError, ArtifactError, CheckpointError.
    """
    sources = {QUANTIZED: open_model(model)} | ({} if reference is None else {FLOAT: open_checkpoint(reference)})
    engines = engines_for(sources)
    engine = engines[QUANTIZED]
    loaded = open_tokenizer(model, tokenizer, engine.spec)
    result: dict[str, dict[str, Any]] = {}
    if text is not None:
        ids = _text_ids(text, loaded, "text", windows, length)
        if reference is None:
            result["text"] = compare_on_text(engine, {}, ids, on_batch=progress)[FLOAT].to_json()
        else:
            compared = compare_on_text(engines[FLOAT], {QUANTIZED: engine}, ids, on_batch=progress)
            result["text"] = compared[QUANTIZED].to_json()
    if lambada_file is not None:
        examples = read_examples(lambada_file, limit)
        result["lambada"] = lambada(engine, examples, loaded, batch=64, on_batch=progress).to_json()
    return result
