"""One case of an experiment: a model to measure, the values that it stands for, and the text it is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rwkvq.ablations.mix import Subject

Text = Literal["text", "long", "calibration", "lambada"]
"""text: windows of the evaluation text; long: as many tokens of it in windows four times as long; calibration: windows
that the statistics of the subject's base line come from; lambada: last words."""
Value = str | float | int | bool


@dataclass(frozen=True, slots=True)
class Case:
    """label: unique in its experiment; parameters: what the experiment varies."""

    label: str
    parameters: Mapping[str, Value]
    subject: Subject
    text: Text = "text"


def line_case(line: str, text: Text = "text", **parameters: Value) -> Case:
    """The case of one line as it is."""
    label = line if text == "text" else f"{line} on {text}"
    return Case(label, {"line": line, **parameters}, Subject(line), text)
