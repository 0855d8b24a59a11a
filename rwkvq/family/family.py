"""A family file: models x policies (x variants), expanded to cells with complete settings each.

Cells of one model share the folder of its windows, activations and proxies wherever these do not differ between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from rwkvq.documents import read_yaml
from rwkvq.errors import SettingsError
from rwkvq.files import canonical_json, sha256_of_bytes
from rwkvq.run import SHARED, Run
from rwkvq.settings import Section, Settings, apply_overrides, parse, problems_of

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Names of families, models, policies and variants become names of folders."""
Values = dict[str, Any]
Overrides = dict[Name, Values | None]

MAX_CELLS = 1000
OF_THE_FAMILY = ("run_dir", "shared_dir")
"""Settings that the family decides."""


class Schedule(Section):
    """When the family runs by itself (flows/serve.py)."""

    cron: str
    """Five fields: minute, hour, day of month, month, day of week."""
    timezone: str = "UTC"
    paused: bool = False


class FamilyFile(Section):
    """What a family file may hold."""

    family: Name
    out: str
    """Folder of all results."""
    settings: Values = Field(default={})
    """Sections of rwkvq/settings.py that hold for every cell."""
    models: Overrides
    """Settings by name of the model; `model` is the checkpoint."""
    policies: Overrides
    """Settings by name of the policy."""
    variants: Overrides = Field(default={})
    """Settings by name of a third axis, for example bits; empty = no such axis."""
    exclude: tuple[str, ...] = ()
    """Names of cells to leave out: "MODEL POLICY" or "MODEL POLICY VARIANT"."""
    schedule: Schedule | None = None
    notify: Literal["never", "failure", "always"] = "failure"
    """When the webhook of the environment is called (flows/notify.py)."""


@dataclass(frozen=True)
class Cell:
    """One run of the family. policy: its name, with that of the variant if there are any."""

    model: str
    policy: str
    settings: Settings

    @property
    def name(self) -> str:
        """`MODEL POLICY`, as in tables, logs and the Prefect UI."""
        return f"{self.model} {self.policy}"

    @cached_property
    def run(self) -> Run:
        """The run of this cell."""
        return Run(self.settings)


@dataclass(frozen=True)
class Family:
    """A family file with its cells, in the order of the file."""

    path: Path
    file: FamilyFile
    cells: tuple[Cell, ...]
    overrides: tuple[str, ...] = ()
    """What changed the settings of every cell, last."""

    @property
    def name(self) -> str:
        """Name of the family."""
        return self.file.family

    @property
    def out(self) -> Path:
        """Folder of all results."""
        return Path(self.file.out)

    @property
    def page(self) -> Path:
        """The page of the family."""
        return self.out / "family.html"

    @property
    def table(self) -> Path:
        """Quality and size of every cell, for plots."""
        return self.out / "family.csv"

    @property
    def metrics(self) -> Path:
        """Flat figures of every cell, for `dvc metrics`."""
        return self.out / "metrics.json"

    @property
    def summary(self) -> Path:
        """State, error and seconds of every cell after the last run."""
        return self.out / "summary.json"

    def groups(self) -> dict[str, tuple[Cell, ...]]:
        """Cells by the folder that they share."""
        groups: dict[str, tuple[Cell, ...]] = {}
        for cell in self.cells:
            folder = str(cell.settings.shared_dir)
            groups[folder] = (*groups.get(folder, ()), cell)
        return groups

    def cell(self, model: str, policy: str) -> Cell:
        """The cell of that name. Raises SettingsError naming those that exist."""
        for cell in self.cells:
            if (cell.model, cell.policy) == (model, policy):
                return cell
        known = ", ".join(cell.name for cell in self.cells)
        raise SettingsError(str(self.path), [f"no cell {model!r} {policy!r}; cells: {known}"])


def load_family(path: Path, overrides: Iterable[str] = ()) -> Family:
    """Read and expand a family file; `overrides` (section.key=value) change `settings` of every cell, last.

    Raises SettingsError with every problem of the file, or of the first cell that has some.
    """
    try:
        file = FamilyFile.model_validate(_tuples(read_yaml(path)))
    except ValidationError as error:
        raise SettingsError(str(path), problems_of(error, FamilyFile)) from error
    if problems := _problems(file):
        raise SettingsError(str(path), problems)
    overrides = list(overrides)
    cells = [
        _cell(path, file, model, policy, variant, overrides)
        for model in file.models
        for policy in file.policies
        for variant in file.variants or ("",)
    ]
    known = {cell.name for cell in cells}
    if unknown := [name for name in file.exclude if name not in known]:
        raise SettingsError(str(path), [f"exclude: no cell {unknown[0]!r}; cells: {', '.join(sorted(known))}"])
    kept = [cell for cell in cells if cell.name not in file.exclude]
    if not kept:
        raise SettingsError(str(path), ["exclude: leaves no cell; remove some of its lines"])
    return Family(path, file, tuple(_sharing(Path(file.out), kept)), tuple(overrides))


def _tuples(values: Values) -> Values:
    return values | {"exclude": tuple(values["exclude"])} if isinstance(values.get("exclude"), list) else values


def _problems(file: FamilyFile) -> list[str]:
    problems = [f"{axis}: empty, expected at least one" for axis in ("models", "policies") if not getattr(file, axis)]
    count = len(file.models) * len(file.policies) * max(1, len(file.variants))
    if count > MAX_CELLS:
        problems.append(f"{count} cells, at most {MAX_CELLS}; split the family into several files")
    if "shared" in file.models:
        problems.append("models.shared: this name is taken by the folder of shared work; choose another")
    for where in (file.settings, *_values_of(file)):
        problems += [f"{key}: is decided by the family, remove it" for key in OF_THE_FAMILY if key in where]
    problems += [
        "run: belongs under settings, it is the same for all cells" for where in _values_of(file) if "run" in where
    ]
    return problems


def _values_of(file: FamilyFile) -> list[Values]:
    return [values or {} for axis in (file.models, file.policies, file.variants) for values in axis.values()]


def _cell(path: Path, file: FamilyFile, model: str, policy: str, variant: str, overrides: Sequence[str]) -> Cell:
    label = " ".join(filter(None, (policy, variant)))
    values: Values = {}
    for part in (file.settings, file.models[model], file.policies[policy], file.variants.get(variant)):
        values = merged(values, part or {})
    values = apply_overrides(values, overrides)
    if problems := [f"{key}: is decided by the family" for key in OF_THE_FAMILY if key in values]:
        raise SettingsError(str(path), problems)
    values["run_dir"] = str(Path(file.out) / model / label.replace(" ", "-"))
    return Cell(model, label, parse(values, f"{path}: cell {model} {label}"))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """`base` with the values of `over` in their place; sections are merged key by key."""
    result = dict(base)
    for key, value in over.items():
        here = result.get(key)
        result[key] = merged(here, value) if isinstance(here, Mapping) and isinstance(value, Mapping) else value
    return result


def _sharing(out: Path, cells: Sequence[Cell]) -> list[Cell]:
    """The cells with their shared folders: one a model, or one for each difference in what is shared."""
    keys = {cell.name: shared_key(cell.settings) for cell in cells}
    result = []
    for cell in cells:
        of_model = {keys[other.name] for other in cells if other.model == cell.model}
        suffix = "" if len(of_model) == 1 else f"-{keys[cell.name][:8]}"
        shared = str(out / "shared" / f"{cell.model}{suffix}")
        result.append(Cell(cell.model, cell.policy, cell.settings.model_copy(update={"shared_dir": shared})))
    return result


def shared_key(settings: Settings) -> str:
    """Hash of all settings that decide what the shared stages write."""
    values = settings.model_dump(mode="json", include={"model", "seed", *SHARED})
    return sha256_of_bytes(canonical_json(values).encode())
