"""The work of one experiment on one model and seed: its cases, their measurements, its rows. A job of a worker process.

A measurement is a file of its own, named by all that decides it, so equal cases of two experiments are measured once
and a run that was killed goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvq.ablations.arms import Arms, open_arms
from rwkvq.ablations.cases import Case, Text
from rwkvq.ablations.experiments import EXPERIMENTS
from rwkvq.ablations.mix import FLOAT, MixSource, Subject, bits_of, identity_of
from rwkvq.ablations.results import ResultRow, key_of, write_rows
from rwkvq.ablations.study import Study
from rwkvq.ablations.table import CASES, EXTRA_ROWS
from rwkvq.calibration.texts import read_texts
from rwkvq.calibration.windows import read_windows
from rwkvq.documents import read_json
from rwkvq.errors import SettingsError
from rwkvq.evaluation.divergence import compare_on_text
from rwkvq.evaluation.lambada import lambada, read_examples
from rwkvq.evaluation.memory import engines_for
from rwkvq.evaluation.perplexity import ids_sha256, text_windows
from rwkvq.files import canonical_json, code_version, sha256_of_bytes, write_json
from rwkvq.models.tokenizer import load_tokenizer

AT_ONCE = 8
"""Models that are measured together: they share one pass of the float model."""
CALIBRATION_WINDOWS = 16
CODE = (
    "rwkvq.ablations.mix",
    "rwkvq.artifact.reader",
    "rwkvq.engine",
    "rwkvq.evaluation",
    "rwkvq.formats",
    "rwkvq.models",
)
"""The sources that decide a measurement."""

OnEvent = Callable[[dict[str, Any]], None]


class Texts:
    """What the models of one study are measured on."""

    def __init__(self, arms: Arms) -> None:
        self._arms = arms
        self._settings = arms.study.evaluation(arms.model)
        self._tokenizer = load_tokenizer(next(iter(arms.runs.values())).tokenizer_path)
        self._evaluated: dict[Text, Tensor] = {}

    def ids(self, text: Text, subject: Subject) -> Tensor:
        """Windows of tokens, int64 [windows, length]. Raises SettingsError, TextError."""
        if text == "calibration":
            windows = read_windows(self._arms.runs[subject.base].windows)
            return torch.from_numpy(windows.ids[~windows.held_out][:CALIBRATION_WINDOWS]).long()
        if text not in self._evaluated:
            self._evaluated[text] = self._cut(text)
        return self._evaluated[text]

    def _cut(self, text: Text) -> Tensor:
        settings = self._settings
        if settings.text is None:
            raise SettingsError(self._arms.study.out, ["evaluate.text: missing, models are measured on it"])
        whole = "\n\n".join(read_texts(settings.text, settings.field, Path()))
        factor = 4 if text == "long" else 1
        count, length = max(1, settings.windows // factor), factor * settings.length
        return text_windows(whole, self._tokenizer, count, length, where=settings.text)

    @cached_property
    def examples(self) -> list[str]:
        """LAMBADA passages. Raises SettingsError, EvaluationError."""
        if self._settings.lambada is None:
            raise SettingsError(self._arms.study.out, ["evaluate.lambada: missing, E1 and E13 need a LAMBADA file"])
        return read_examples(Path(self._settings.lambada), self._settings.lambada_limit)

    def identity(self, case: Case) -> str:
        """Which tokens a case is measured on."""
        if case.text == "lambada":
            return sha256_of_bytes("\0".join(self.examples).encode())
        ids = self.ids(case.text, case.subject)
        return f"{len(ids)} x {ids.shape[1]} {ids_sha256(ids)}"  # the hash alone is that of the tokens in a row

    def measure(self, text: Text, subjects: Sequence[Subject]) -> list[dict[str, Any]]:
        """Figures of several models on one text, as plain values: TextResult, or LambadaResult with its examples."""
        arms = self._arms
        sources = {str(index): MixSource(item, arms.checkpoint, arms.artifacts) for index, item in enumerate(subjects)}
        engines = engines_for({FLOAT: arms.checkpoint, **sources}, self._settings.memory_gb)
        if text == "lambada":
            batch = 4 * self._settings.batch
            found = [lambada(engines[name], self.examples, self._tokenizer, batch=batch) for name in sources]
            return [item.to_json() | {"logprobs": list(item.logprobs)} for item in found]
        reference = engines.pop(FLOAT)
        compared = compare_on_text(reference, engines, self.ids(text, subjects[0]), batch=self._settings.batch)
        return [compared[name].to_json() | {"window_kl": list(compared[name].window_kl or ())} for name in sources]


def run(job: Mapping[str, Any], on_event: OnEvent) -> dict[str, Any]:
    """Measure job["experiment"] of job["study"] on one model and seed; return {"rows", "measured", "kept"}.

    Sends {"what", "done", "total"} after every group of cases. Raises RwkvqError for what is missing or damaged.
    """
    study = Study.model_validate(_tuples(job["study"]))
    experiment, model, seed = job["experiment"], job["model"], job["seed"]
    arms = open_arms(study, model, seed, EXPERIMENTS[experiment].lines)
    path = study.rows_of(experiment, model, seed)
    key = part_key(arms, experiment)
    if key_of(path) == key:
        return {"rows": 0, "measured": 0, "kept": True}
    cases = CASES[experiment](arms) if experiment in CASES else []
    texts = Texts(arms)
    files = {case.label: study.measured / f"{measurement_key(arms, texts, case)}.json" for case in cases}
    # cases that come to the same choice are measured once
    by_file = {files[case.label]: case for case in cases if not files[case.label].is_file()}
    missing, done = list(by_file.values()), 0
    for group in groups(missing):
        found = texts.measure(group[0].text, [case.subject for case in group])
        for case, figures in zip(group, found, strict=True):
            write_json(files[case.label], figures)
        done += len(group)
        on_event({"what": group[-1].label, "done": done, "total": len(missing)})
    rows = [_row(arms, experiment, case, read_json(files[case.label])) for case in cases]
    rows += EXTRA_ROWS[experiment](arms) if experiment in EXTRA_ROWS else []
    write_rows(path, rows, key)
    return {"rows": len(rows), "measured": len(missing), "kept": False}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def groups(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that are measured together: of one text and, where windows depend on the line, of one line."""
    found: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        found.setdefault((case.text, case.subject.base if case.text == "calibration" else ""), []).append(case)
    return [same[start : start + AT_ONCE] for same in found.values() for start in range(0, len(same), AT_ONCE)]


def measurement_key(arms: Arms, texts: Texts, case: Case) -> str:
    """Hash of all that decides the figures of a case."""
    values = {
        "model": identity_of(case.subject, arms.checkpoint, arms.artifacts),
        "text": texts.identity(case),
        "kind": "lambada" if case.text == "lambada" else "text",
        "code": code_version(CODE),
    }
    return sha256_of_bytes(canonical_json(values).encode())


def part_key(arms: Arms, experiment: str) -> str:
    """Hash of all that decides the rows of one experiment on one model and seed."""
    values = {
        "experiment": experiment,
        "artifacts": {line: artifact.identity() for line, artifact in arms.artifacts.items()},
        "evaluate": arms.study.evaluation(arms.model).model_dump(mode="json"),
        "code": code_version((*CODE, "rwkvq.ablations", "rwkvq.plan", "rwkvq.proxies")),
    }
    return sha256_of_bytes(canonical_json(values).encode())


def _row(arms: Arms, experiment: str, case: Case, found: Mapping[str, Any]) -> ResultRow:
    """The row of a measured case."""
    bits = bits_of(case.subject, arms.plans)
    common = ResultRow(
        experiment=experiment,
        model=arms.model,
        seed=arms.seed,
        setting=case.label,
        parameters=dict(case.parameters),
        text=case.text,
        matrix_bits=bits.matrix if bits else None,
        body_bits=bits.body if bits else None,
        sq_share=bits.sq if bits else None,
    )
    if case.text == "lambada":
        logprobs = found["logprobs"]
        half = len(logprobs) // 2
        figures = {
            "nll": -found["mean_logprob"],
            "nll_se": found["mean_logprob_se"],
            "first": -sum(logprobs[:half]) / half,
            "second": -sum(logprobs[half:]) / (len(logprobs) - half),
            "accuracy": found["acc"],
        }
        words = tuple(logprobs)
        return replace(common, tokens=found["target_tokens"], word_logprobs=words, figures=figures)
    return replace(
        common,
        tokens=found["predictions"],
        kl=found["kl"],
        kl_se=found["kl_se"],
        kl_p99=found["kl_p99"],
        nll=found["nll"],
        ppl=found["ppl"],
        top1=found["top1"],
        kl_by_position=tuple(found["kl_by_position"]),
        window_kl=tuple(found["window_kl"]),
    )
