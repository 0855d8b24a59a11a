"""ModelSpec: version and sizes of an RWKV model, read from the shapes of its tensors and from nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from rwkvq.errors import CheckpointError

Version = Literal["x060", "x070"]
RANKS: Mapping[Version, tuple[str, ...]] = {"x060": ("mix", "decay"), "x070": ("w", "a", "v", "g")}
"""Names of the low-rank paths of each version."""
MARKERS: Mapping[Version, str] = {"x060": "blocks.0.att.time_maa_x", "x070": "blocks.0.att.k_k"}
"""A tensor that only this version has."""
_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.")
_SIZES = ("layers", "width", "heads", "head_size", "ffn", "vocab")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Version and sizes of a model; every size is at least 1 and width = heads * head_size.

    lora_ranks holds the names of RANKS[version]; rank v is 0 in an x070 model of one block, which has no v path.
    """

    version: Version
    layers: int
    width: int
    heads: int
    head_size: int
    ffn: int
    vocab: int
    lora_ranks: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values that from_json reads back."""
        return {**asdict(self), "lora_ranks": dict(self.lora_ranks)}

    @classmethod
    def from_json(cls, values: Any) -> ModelSpec:
        """Read what to_json wrote; raise CheckpointError naming the first key that is missing or out of range."""
        if not isinstance(values, Mapping) or values.get("version") not in tuple(RANKS):
            raise CheckpointError("model description: no version, expected x060 or x070; write it again")
        version = cast(Version, values["version"])
        ranks = values.get("lora_ranks")
        ranks = dict(ranks) if isinstance(ranks, Mapping) else {}
        found = {name: values.get(name) for name in _SIZES}
        found |= {f"lora_ranks.{name}": ranks.get(name) for name in RANKS[version]}
        for name, value in found.items():
            if type(value) is not int or value < (0 if name == "lora_ranks.v" else 1):
                raise CheckpointError(f"model description: {name} is {value!r}, expected a positive whole number")
        if values["heads"] * values["head_size"] != values["width"]:
            raise CheckpointError("model description: heads * head_size differs from width; write it again")
        sizes = {name: int(values[name]) for name in _SIZES}
        return cls(version=version, **sizes, lora_ranks={name: ranks[name] for name in RANKS[version]})


def count_blocks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """1 + the highest block number; raise CheckpointError if there is no block or some block has no tensor."""
    found = {int(match.group(1)) for name in shapes if (match := _BLOCK.match(name))}
    if not found:
        raise CheckpointError("holds no tensor named blocks.N.*, expected an RWKV-6 or RWKV-7 checkpoint")
    absent = next((index for index in range(max(found) + 1) if index not in found), None)
    if absent is not None:
        raise CheckpointError(f"block {absent} has no tensors although block {max(found)} has; use a complete file")
    return max(found) + 1


def spec_of(shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """Read version and sizes from the shapes by released name.

    A size is what most blocks agree on, so that one wrong tensor is named as such later, and not all the others.
    Raises CheckpointError if the version or a size cannot be told, or the head layout does not give the width.
    """
    version = next((name for name, marker in MARKERS.items() if marker in shapes), None)
    if version is None:
        raise CheckpointError(f"neither x060 ({MARKERS['x060']}) nor x070 ({MARKERS['x070']}): not RWKV-6 or RWKV-7")
    layers = count_blocks(shapes)
    bonus = {"x060": "att.time_faaaa", "x070": "att.r_k"}[version]
    spec = ModelSpec(
        version=version,
        layers=layers,
        width=_common(shapes, layers, "ln1.weight", 1, 0),
        heads=_common(shapes, layers, bonus, 2, 0),
        head_size=_common(shapes, layers, bonus, 2, 1),
        ffn=_common(shapes, layers, "ffn.key.weight", 2, 0),
        vocab=_size(shapes, "emb.weight", 2, 0),
        lora_ranks=_ranks(shapes, version, layers),
    )
    if spec.heads * spec.head_size != spec.width:
        raise CheckpointError(f"{bonus} is [{spec.heads}, {spec.head_size}], expected heads x size = {spec.width}")
    return spec


def _ranks(shapes: Mapping[str, tuple[int, ...]], version: Version, layers: int) -> dict[str, int]:
    if version == "x060":
        mix = _common(shapes, layers, "att.time_maa_w2", 3, 1)
        return {"mix": mix, "decay": _common(shapes, layers, "att.time_decay_w1", 2, 1)}
    ranks = {name: _common(shapes, layers, f"att.{name}1", 2, 1) for name in "wag"}
    # block 0 may hold v1 but never uses it, so a model of one block has no v path at all
    v_rank = _common(shapes, layers, "att.v1", 2, 1, first=1) if layers > 1 else 0
    return {name: v_rank if name == "v" else ranks[name] for name in RANKS["x070"]}


def _common(
    shapes: Mapping[str, tuple[int, ...]], layers: int, name: str, rank: int, axis: int, *, first: int = 0
) -> int:
    """The size of `axis` that most blocks give to tensor `name`; raise CheckpointError if none can tell."""
    found = [shapes.get(f"blocks.{index}.{name}", ()) for index in range(first, layers)]
    sizes = Counter(shape[axis] for shape in found if len(shape) == rank and shape[axis] > 0)
    if not sizes:
        raise CheckpointError(f"blocks.N.{name} is missing or not a {rank}-D tensor, so its size cannot be read")
    return sizes.most_common(1)[0][0]


def _size(shapes: Mapping[str, tuple[int, ...]], name: str, rank: int, axis: int) -> int:
    shape = shapes.get(name, ())
    if len(shape) != rank or shape[axis] < 1:
        raise CheckpointError(f"{name} is missing or not a {rank}-D tensor, so its size cannot be read")
    return shape[axis]
