"""A study: models, seeds and experiments with the settings they share, and the run folder of every line.

The lines are cells of a family, so whatever runs a family runs them; texts are measured later, on all models alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from rwkvq.ablations.experiments import EXPERIMENTS, with_used
from rwkvq.ablations.lines import LINES
from rwkvq.documents import read_yaml
from rwkvq.errors import SettingsError
from rwkvq.evaluation.lambada import read_examples
from rwkvq.family.family import Cell, Family, FamilyFile, Overrides, Values, merged, shared_key
from rwkvq.files import write_text
from rwkvq.run import Run
from rwkvq.settings import EvaluateSettings, Section, Settings, apply_overrides, parse, problems_of


class Study(Section):
    """What an ablations file holds, with what the command line chose of it."""

    out: str
    """Folder of all results."""
    settings: Values = Field(default={})
    """Sections of rwkvq/settings.py that hold for every line; evaluate.* says what every model is measured on."""
    models: Overrides
    """Settings by name of the model; `model` is the checkpoint."""
    order: tuple[str, ...] = ()
    """All models of the file, which `models` need not have: pages show them in this order."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Of the calibration windows; experiments in which a seed matters run for each, the others for the first."""
    experiments: tuple[str, ...] = tuple(EXPERIMENTS)
    leak_windows: Annotated[int, Field(gt=0)] = 44
    """Calibration windows in E1: at most what half of the LAMBADA file fills."""

    @property
    def folder(self) -> Path:
        """Folder of all results."""
        return Path(self.out)

    @property
    def measured(self) -> Path:
        """One file a measurement, by its key."""
        return self.folder / "measured"

    @property
    def results(self) -> Path:
        """The table of all rows."""
        return self.folder / "ablations.parquet"

    @property
    def texts(self) -> Path:
        """Calibration texts that experiments need beside the given one."""
        return self.folder / "texts"

    def rows_of(self, experiment: str, model: str, seed: int) -> Path:
        """Rows of one experiment on one model and seed."""
        return self.folder / "rows" / f"{experiment}-{model}-{seed}.parquet"

    def settings_of(self, model: str, seed: int, line: str) -> Settings:
        """Complete settings of one line. Raises SettingsError."""
        values = merged(self.settings, self.models[model] or {})
        # a line is measured with all others of its model, and E1 on purpose on text it was calibrated on
        values = {key: value for key, value in values.items() if key != "evaluate"}
        filled = [item.format(texts=self.texts, leak_windows=self.leak_windows) for item in LINES[line]]
        values = apply_overrides(values, [*filled, f"seed={seed}"])
        values |= {"run_dir": str(self.folder / model / f"seed-{seed}" / line)}
        settings = parse(values, f"{self.out}: line {line} of {model}")
        shared = self.folder / "shared" / f"{model}-seed-{seed}-{shared_key(settings)[:8]}"
        return settings.model_copy(update={"shared_dir": str(shared)})

    def run_of(self, model: str, seed: int, line: str) -> Run:
        """The run of one line."""
        return Run(self.settings_of(model, seed, line))

    def evaluation(self, model: str) -> EvaluateSettings:
        """What the models are measured on. Raises SettingsError."""
        values = merged(self.settings, self.models[model] or {})
        return parse({"evaluate": values.get("evaluate", {})}, f"{self.out}: evaluate").evaluate

    def parts(self) -> list[tuple[str, str, int]]:
        """(experiment, model, seed) of everything to do."""
        chosen = [EXPERIMENTS[key] for key in self.experiments]
        return [
            (experiment.key, model, seed)
            for experiment in chosen
            if experiment.lines
            for model in self.models
            for seed in (self.seeds if experiment.every_seed else self.seeds[:1])
        ]

    def family(self) -> Family:
        """The lines that the chosen experiments need, as cells of a family. Raises SettingsError."""
        needed: dict[tuple[str, int, str], None] = {}
        for experiment, model, seed in self.parts():
            needed |= dict.fromkeys((model, seed, line) for line in EXPERIMENTS[experiment].lines)
        cells = tuple(
            Cell(model, f"{line} seed-{seed}", self.settings_of(model, seed, line)) for model, seed, line in needed
        )
        lines = dict.fromkeys(line for _, _, line in needed)
        file = FamilyFile(family="ablations", out=self.out, models=self.models, policies=dict.fromkeys(lines))
        return Family(self.folder, file, cells)


def load_study(
    path: Path,
    *,
    experiments: Sequence[str] = (),
    models: Sequence[str] = (),
    seeds: Sequence[int] = (),
    overrides: Iterable[str] = (),
) -> Study:
    """Read an ablations file; the other arguments choose of it, none = all. Raises SettingsError with every problem."""
    values = read_yaml(path)
    values["settings"] = apply_overrides(values.get("settings") or {}, overrides)
    for key in ("seeds", "experiments"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise SettingsError(str(path), problems_of(error, Study)) from error
    chosen = with_used(experiments or study.experiments)
    problems = [f"no experiment {key!r}; known: {', '.join(EXPERIMENTS)}" for key in chosen if key not in EXPERIMENTS]
    problems += [f"no model {name!r}; models: {', '.join(study.models)}" for name in models if name not in study.models]
    if study.settings.get("run", {}).get("runner", "threads") != "threads":
        problems.append("settings.run.runner: experiments run with runner threads; remove it")
    if problems:
        raise SettingsError(str(path), problems)
    return study.model_copy(
        update={
            "experiments": tuple(key for key in EXPERIMENTS if key in chosen),
            "models": {name: study.models[name] for name in models or study.models},
            "order": tuple(study.models),
            "seeds": tuple(seeds or study.seeds),
        }
    )


def write_texts(study: Study) -> None:
    """Write both halves of the LAMBADA file as calibration texts, for E1. Raises EvaluationError."""
    if "E1" not in study.experiments:
        return
    first, second = leak_halves(study, next(iter(study.models)))
    for name, half in (("first", first), ("second", second)):
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in half)
        path = study.texts / f"lambada-{name}.jsonl"
        if not path.is_file() or path.read_text(encoding="utf-8") != lines:
            write_text(path, lines)


def leak_halves(study: Study, model: str) -> tuple[list[str], list[str]]:
    """The examples of the LAMBADA file, cut in the middle. Raises SettingsError without one, EvaluationError."""
    settings = study.evaluation(model)
    if settings.lambada is None:
        raise SettingsError(study.out, ["evaluate.lambada: missing, E1 and E13 need a LAMBADA file"])
    examples = read_examples(Path(settings.lambada), settings.lambada_limit)
    return examples[: len(examples) // 2], examples[len(examples) // 2 :]
