"""What the choices of an experiment are made by: the lines' artifacts, the proxies, the measured errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rwkvq.ablations.study import Study
from rwkvq.artifact.reader import Artifact, open_artifact
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.plan.decide import Candidate, Verdict
from rwkvq.plan.tensor import PlannedTensor
from rwkvq.proxies import table
from rwkvq.run import Run
from rwkvq.settings import GapMode

ErrorKind = Literal["weight_error", "output_error"]


@dataclass(frozen=True)
class Arms:
    """Lines of one model and seed. artifacts: by line; proxies: rows by weight; runs: by line."""

    study: Study
    model: str
    seed: int
    checkpoint: Checkpoint
    artifacts: Mapping[str, Artifact]
    proxies: Mapping[str, table.Row]
    runs: Mapping[str, Run]

    @property
    def plans(self) -> dict[str, Sequence[PlannedTensor]]:
        """Plan rows by line."""
        return {line: artifact.plan.tensors for line, artifact in self.artifacts.items()}

    @cached_property
    def decided(self) -> dict[str, PlannedTensor]:
        """Plan rows of arm SQ by name: the matrices and LoRA factors that go to one of the arms."""
        return {row.name: row for row in self.artifacts["sq"].plan.tensors if row.method == "gptq"}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Weights of every decided matrix."""
        return {name: row.numel for name, row in self.decided.items()}

    def error(self, line: str, name: str, kind: ErrorKind) -> float:
        """Relative squared error of one weight in one line (rwkvq.quantize.block.TensorError)."""
        return float(self.artifacts[line].errors[name][kind])

    def ratio(self, name: str, kind: ErrorKind, sq: str = "sq", vq: str = "vq") -> float:
        """Logarithm of the error of SQ over that of VQ; below 0 where SQ is better."""
        return math.log(max(self.error(sq, name, kind), 1e-30) / max(self.error(vq, name, kind), 1e-30))

    def candidates(self, mode: GapMode, fine: Mapping[str, float] | None = None) -> list[Candidate]:
        """What the decision rules see, in one gap mode; fine: another P_f by name."""
        plans = {line: {row.name: row for row in self.artifacts[line].plan.tensors} for line in ("sq", "vq")}
        found = []
        for name in self.decided:
            measures = self.proxies[name].measures.of_mode(mode)
            found.append(
                Candidate(
                    name=name,
                    numel=self.sizes[name],
                    p_c=measures.p_c,
                    p_f=measures.p_f if fine is None else fine[name],
                    max_over_rms=self.proxies[name].measures.max_over_rms,
                    sq_bits=plans["sq"][name].stored_bits,
                    vq_bits=plans["vq"][name].stored_bits,
                )
            )
        return found


def open_arms(study: Study, model: str, seed: int, lines: Iterable[str]) -> Arms:
    """Open the packed lines of one model and seed. Raises ArtifactError, PlanError, CheckpointError."""
    runs = {line: study.run_of(model, seed, line) for line in lines}
    first = next(iter(runs.values()))
    return Arms(
        study=study,
        model=model,
        seed=seed,
        checkpoint=first.checkpoint,
        artifacts={line: open_artifact(run.artifact) for line, run in runs.items()},
        proxies={row.name: row for row in table.read(first.proxies)},
        runs=runs,
    )


def lowest(scores: Mapping[str, float], sizes: Mapping[str, int], share: float) -> set[str]:
    """The names of the lowest scores, ties by name, as few as make `share` of all weights."""
    target, total, chosen = share * sum(sizes.values()) * (1 - 1e-9), 0, set()
    for name in sorted(scores, key=lambda name: (scores[name], name)):
        if total >= target:
            break
        chosen.add(name)
        total += sizes[name]
    return chosen


def choice_of(arms: Arms, sq: Iterable[str], lines: tuple[str, str] = ("sq", "vq")) -> dict[str, tuple[str, ...]]:
    """The choice that sends the names in `sq` to the first of `lines` and all other decided weights to the second."""
    chosen = set(sq)
    return {name: (lines[0] if name in chosen else lines[1],) for name in arms.decided}


def sq_of(verdict: Verdict) -> list[str]:
    """The weights that a decision rule sends to SQ."""
    return [name for name, arm in verdict.arms.items() if arm == "sq"]
