"""What lies where in an artifact folder: names of files, names of stored tensors, and how weights fill shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from rwkvq.formats import Layout
from rwkvq.plan.plan import PlannedTensor

FORMAT = "rwkvq/1"
"""Version of the whole layout; any change that an older reader would misread raises the number."""

CONFIG = "config.json"
QUANTIZATION = "quantization.json"
PROVENANCE = "provenance.json"
SUMS = "SHA256SUMS"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_SUFFIXES = (".json", ".txt")
"""A Hugging Face tokenizer and the World vocabulary; the copy is named `tokenizer` and keeps its ending."""

SHARD_BYTES = 4_000_000_000
"""Tensor bytes of one shard at most, unless a single weight is larger."""

_SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Key, dtype and shape of one stored tensor."""


def part_key(weight: str, layout: Layout, part: str) -> str:
    """Key of a part in the safetensors file: `weight::part`, or the weight's own name if it is dense."""
    return weight if layout.format == "dense" else f"{weight}::{part}"


def entries_of(planned: PlannedTensor) -> list[Entry]:
    """Stored tensors of one weight, in the order of its layout's parts."""
    parts = planned.layout.parts().items()
    return [(part_key(planned.name, planned.layout, part), dtype, shape) for part, (dtype, shape) in parts]


def is_shard_name(name: str) -> bool:
    """True for the names that the weight files of an artifact may have, none of which leaves the folder."""
    return _SHARD_NAME.fullmatch(name) is not None


def shards_of(tensors: Sequence[PlannedTensor], limit: int) -> list[tuple[str, list[PlannedTensor]]]:
    """File name and weights of each shard: plan order, a new shard where `limit` bytes would be passed.

    The parts of one weight stay in one file. A single shard has the plain name.
    """
    groups = list(_filled(tensors, limit))
    if len(groups) == 1:
        return [(SINGLE, groups[0])]
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return list(zip(names, groups, strict=True))


def _filled(tensors: Sequence[PlannedTensor], limit: int) -> Iterator[list[PlannedTensor]]:
    group: list[PlannedTensor] = []
    used = 0
    for planned in tensors:
        size = planned.layout.stored_bits() // 8
        if group and used + size > limit:
            yield group
            group, used = [], 0
        group.append(planned)
        used += size
    yield group
