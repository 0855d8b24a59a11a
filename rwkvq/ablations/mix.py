"""A model made of several lines: each weight, or each block of its rows, comes from the artifact of one of them.

All arms quantize a weight by the statistics of the float model, so what one weight gets does not depend on what the
others got, and a mix of two artifacts is the artifact that a plan with that mix would give. Rows are independent in
GPTQ and GPTVQ (codebooks serve whole blocks of ROWS rows), so the same holds of row blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvq.artifact.reader import Artifact
from rwkvq.checkpoint.names import Weight, assemble, extract, weights_of
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.files import canonical_json, sha256_of_bytes
from rwkvq.formats import ScalarLayout, VectorLayout
from rwkvq.plan.bits import Totals, totals
from rwkvq.plan.tensor import PlannedTensor

FLOAT = "float"
"""The line that is the checkpoint itself."""
ROWS = 64
"""Rows of a block that is chosen by itself: the rows that a codebook of arm VQ serves."""

Choice = Mapping[str, tuple[str, ...]]
"""Lines of a weight's row blocks by its name; a single one is that of the whole weight."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: the weights of line `base`, but those in `choice`."""

    base: str
    choice: Choice = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """Names of all lines it is made of."""
        return sorted({self.base, *(line for blocks in self.choice.values() for line in blocks)})

    def to_json(self) -> dict[str, Any]:
        """As plain values; equal models made of the same lines give equal ones."""
        used = {name: list(blocks) for name, blocks in sorted(self.choice.items()) if set(blocks) != {self.base}}
        return {"base": self.base, "choice": used}


@dataclass(frozen=True)
class Bits:
    """Stored bits per weight of matrices and of all but embedding and head; sq: share of SQ by matrix weights."""

    matrix: float
    body: float
    sq: float


class MixSource:
    """The weights of a subject as a WeightSource; decoded when they are asked for."""

    def __init__(self, subject: Subject, checkpoint: Checkpoint, artifacts: Mapping[str, Artifact]) -> None:
        self.subject = subject
        self.path = Path("+".join(subject.lines))
        self.spec: ModelSpec = checkpoint.spec
        self._checkpoint = checkpoint
        self._artifacts = artifacts
        self._weights: dict[str, list[Weight]] = {}
        shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
        for weight in weights_of(checkpoint.spec, shapes):
            self._weights.setdefault(weight.tensor, []).append(weight)

    def names(self) -> list[str]:
        """Tensor names in the released naming and order."""
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape."""
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of what tensor() returns: float32 where several lines meet."""
        lines = {line for weight in self._weights[name] for line in self._lines_of(weight.name)}
        return self._source(lines.pop()).dtype(name) if len(lines) == 1 else torch.float32

    def tensor(self, name: str) -> Tensor:
        """One tensor in checkpoint orientation and shape. Raises ArtifactError, CheckpointError."""
        weights = self._weights[name]
        lines = {line for weight in weights for line in self._lines_of(weight.name)}
        if len(lines) == 1:
            return self._source(lines.pop()).tensor(name)
        return assemble({weight.name: self._weight(weight) for weight in weights}, weights, self.shape(name))

    def identity(self) -> str:
        """Hex SHA-256 of what the weights come from."""
        return identity_of(self.subject, self._checkpoint, self._artifacts)

    def _lines_of(self, name: str) -> tuple[str, ...]:
        return self.subject.choice.get(name, (self.subject.base,))

    def _source(self, line: str) -> Checkpoint | Artifact:
        return self._checkpoint if line == FLOAT else self._artifacts[line]

    def _weight(self, weight: Weight) -> Tensor:
        lines = self._lines_of(weight.name)
        decoded = {line: self._decoded(weight, line) for line in set(lines)}
        if len(lines) == 1:
            return decoded[lines[0]]
        blocks = [decoded[line][index * ROWS : (index + 1) * ROWS] for index, line in enumerate(lines)]
        return torch.cat(blocks)

    def _decoded(self, weight: Weight, line: str) -> Tensor:
        if line == FLOAT:
            return extract(self._checkpoint.tensor(weight.tensor), weight).float()
        return self._artifacts[line].weight(weight.name).float()


def identity_of(subject: Subject, checkpoint: Checkpoint, artifacts: Mapping[str, Artifact]) -> str:
    """Hex SHA-256 of the choice and of the bytes of everything it takes weights from."""
    sources = {line: artifacts[line].identity() for line in subject.lines if line != FLOAT}
    values = {"subject": subject.to_json(), "checkpoint": checkpoint.identity(), "artifacts": sources}
    return sha256_of_bytes(canonical_json(values).encode())


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a plan that a mix stores."""

    tensors: tuple[PlannedTensor, ...]


def bits_of(subject: Subject, plans: Mapping[str, Sequence[PlannedTensor]]) -> Bits | None:
    """What a mix stores, by the rows of the lines' plans; a weight chosen by row blocks stores one bit more a block.

    None for a mix with weights of the checkpoint, which tells what some weights cost and is nothing that one stores.
    """
    if FLOAT in subject.lines:
        return None
    base = subject.base
    rows = {line: {row.name: row for row in plan} for line, plan in plans.items()}
    stored: list[PlannedTensor] = []
    flags = sq = matrices = 0
    for row in plans[base]:
        lines = subject.choice.get(row.name, (base,))
        chosen = [rows[line][row.name] for line in lines]
        parts = chosen if len(lines) == 1 else [row_block(item, index) for index, item in enumerate(chosen)]
        flags += len(parts) if len(parts) > 1 else 0
        stored += parts
        if row.weight_class in ("matrix", "lora"):
            matrices += row.numel
            sq += sum(item.numel for item in parts if item.layout.format == "scalar")
    found: Totals = totals(_Rows(tuple(stored)))
    assert found.matrix_bits is not None
    extra = flags / found.matrix_weights
    return Bits(found.matrix_bits + extra, found.body_bits + flags / found.body_weights, sq / matrices)


def row_block(row: PlannedTensor, index: int) -> PlannedTensor:
    """The plan's row of ROWS rows of a matrix (the last block may have fewer): its layout and shape for these alone."""
    assert isinstance(row.layout, ScalarLayout | VectorLayout), row.layout
    count = min(ROWS, row.layout.rows - index * ROWS)
    columns = row.layout.columns
    shape = (columns, count) if row.transposed else (count, columns)
    layout = replace(row.layout, rows=count)
    return replace(row, tensor_shape=shape if row.index is None else (row.tensor_shape[0], *shape), layout=layout)
