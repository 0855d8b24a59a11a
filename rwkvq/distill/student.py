"""The quantized model that is trained: every weight as an artifact would give it, and the vectors that may move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkvq.checkpoint.names import Weight, assemble, extract, weights_of
from rwkvq.checkpoint.reader import WeightSource
from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.formats import DenseLayout, decode_parts, dense
from rwkvq.formats.dense import DTYPES
from rwkvq.models import load_block
from rwkvq.plan.plan import Plan, PlannedTensor

Parts = Callable[[PlannedTensor], Mapping[str, Tensor]]
"""Returns the packed parts of a weight that is not kept, by part name."""
Values = Mapping[str, Tensor]
"""Vectors that may move, by name, each in the shape that the model computes with."""
OUTER = ("emb.weight", "head.weight")


def trained_weights(plan: Plan) -> list[PlannedTensor]:
    """The weights that may move: vectors that the plan keeps. Matrices, embedding and head never do."""
    vectors = ("keep", "elementwise")
    kept = [entry for entry in plan.tensors if entry.method == "keep" and entry.weight_class in vectors]
    return [entry for entry in kept if entry.name not in OUTER]


class QuantizedSource:
    """A WeightSource of what `plan` makes of `source`: quantized weights decoded, kept ones in their stored dtype."""

    def __init__(self, source: WeightSource, plan: Plan, parts: Parts) -> None:
        self.path: Path = source.path
        self.spec: ModelSpec = source.spec
        self._source, self._parts = source, parts
        self._planned = {entry.name: entry for entry in plan.tensors}
        self._weights: dict[str, list[Weight]] = {}
        for weight in weights_of(source.spec, {name: source.shape(name) for name in source.names()}):
            self._weights.setdefault(weight.tensor, []).append(weight)

    def names(self) -> list[str]:
        """Tensor names in the released naming and order."""
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """As in the float checkpoint."""
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """float32 for quantized tensors, the stored dtype for kept ones."""
        layouts = [self._planned[weight.name].layout for weight in self._weights[name]]
        dtypes = {DTYPES[layout.dtype] if isinstance(layout, DenseLayout) else torch.float32 for layout in layouts}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def tensor(self, name: str) -> Tensor:
        """One tensor in checkpoint orientation and shape. Raises what reading the parts raises."""
        weights, dtype = self._weights[name], self.dtype(name)
        return assemble({w.name: self._weight(w).to(dtype) for w in weights}, weights, self.shape(name))

    def identity(self) -> str:
        """That of the float checkpoint."""
        return self._source.identity()

    def _weight(self, weight: Weight) -> Tensor:
        entry = self._planned[weight.name]
        if entry.method != "keep":
            return decode_parts(entry.layout, self._parts(entry))
        assert isinstance(entry.layout, DenseLayout)
        return dense.encode(extract(self._source.tensor(weight.tensor), weight), entry.layout).values


@dataclass(frozen=True, slots=True)
class Student:
    """The quantized model in memory, in one dtype of computation.

    blocks: as models.load_block returns them; emb [vocab, width] in its stored dtype; head [vocab, width]; ln_out: its
    weight and bias [width]. Where a function takes Values too, those count and not what is stored here.
    """

    spec: ModelSpec
    blocks: tuple[Mapping[str, Tensor], ...]
    emb: Tensor
    head: Tensor
    ln_out: Mapping[str, Tensor]

    @classmethod
    def of(cls, source: WeightSource, dtype: torch.dtype = torch.float32) -> Student:
        """Load the whole model. Raises what reading it raises."""
        emb, head = (source.tensor(name) for name in OUTER)
        names = ("ln_out.weight", "ln_out.bias")
        ln_out = {name: source.tensor(name).reshape(-1).to(dtype) for name in names}
        blocks = tuple(load_block(source, index, dtype) for index in range(source.spec.layers))
        return cls(source.spec, blocks, emb, head.to(dtype), ln_out)

    def value(self, name: str) -> Tensor:
        """A tensor by its full name, emb and head left out."""
        if name in self.ln_out:
            return self.ln_out[name]
        _, index, rest = name.split(".", 2)
        return self.blocks[int(index)][rest]

    def block(self, index: int, values: Values) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights of a block with `values` in their place, and those of them that its run reads."""
        prefix = f"blocks.{index}."
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        moved = {name: value for name, value in own.items() if not name.startswith("ln0.")}
        return {**self.blocks[index], **own}, moved


@dataclass(frozen=True, slots=True)
class Vectors:
    """All vectors that may move as one flat vector, in the order of the plan.

    names, shapes (of computation), dtypes (stored), and sizes of the parts.
    """

    entries: tuple[PlannedTensor, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, plan: Plan, student: Student) -> Vectors:
        """Those of the plan, shaped as the student has them."""
        entries = tuple(trained_weights(plan))
        return cls(entries, tuple(tuple(student.value(entry.tensor).shape) for entry in entries))

    def join(self, values: Values) -> Tensor:
        """One flat vector of the values."""
        return torch.cat([values[entry.name].reshape(-1) for entry in self.entries])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The values by name; the inverse of join."""
        pieces = torch.split(flat, [math.prod(shape) for shape in self.shapes])
        named = zip(self.entries, pieces, self.shapes, strict=True)
        return {entry.name: piece.reshape(shape) for entry, piece, shape in named}

    def stored(self, flat: Tensor) -> dict[str, Tensor]:
        """The values as the plan stores them, in its shapes and dtypes. Raises QuantizationError: too large for one."""
        values = self.split(flat)
        result = {}
        for entry in self.entries:
            assert isinstance(entry.layout, DenseLayout)
            result[entry.name] = dense.encode(values[entry.name].reshape(entry.layout.shape), entry.layout).values
        return result

    def rounded(self, flat: Tensor) -> Tensor:
        """What storing would leave of a flat vector, in its own dtype. Raises QuantizationError, as `stored`."""
        return self.join(self.stored(flat)).to(flat.dtype)

    def root_mean_squares(self, flat: Tensor) -> Tensor:
        """For each value the root mean square of its tensor."""
        pieces = self.split(flat).values()
        return torch.cat([piece.square().mean().sqrt().expand(piece.numel()) for piece in pieces])
