"""What a stage is, and the seconds it took."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkvq.files import Progress, write_json
from rwkvq.run import SHARED, Run

Hashes = dict[str, str]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the line.

    settings: the values that decide its result; inputs: hex sha256 by name; outputs: files and folders it writes;
    code: the modules that decide its bytes; body: the work itself.
    """

    name: str
    settings: Callable[[Run], dict[str, Any]]
    inputs: Callable[[Run], Hashes]
    outputs: Callable[[Run], list[Path]]
    code: tuple[str, ...]
    body: Callable[[Run, Progress], None]


@dataclass(frozen=True, slots=True)
class StageResult:
    """Whether a stage ran, why (or why not), and the seconds it took."""

    stage: str
    ran: bool
    reason: str
    seconds: float


def save_seconds(run: Run, name: str, seconds: float) -> None:
    """Remember how long a stage took, for the report, beside the outputs of that stage."""
    path = run.timings(name)
    write_json(path, _read(path) | {name: round(seconds, 2)})


def read_seconds(run: Run) -> dict[str, float]:
    """Seconds by stage of the last time each ran, also of those whose outputs are shared with other runs."""
    return _read(run.timings(SHARED[0])) | _read(run.timings("plan"))


def _read(path: Path) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}
