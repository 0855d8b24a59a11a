"""Verify an artifact: checksums, structure, every tensor decoded, stored bits counted again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rwkvq.artifact.layout import SUMS
from rwkvq.artifact.reader import Artifact, open_artifact
from rwkvq.artifact.sums import read_sums
from rwkvq.errors import ArtifactError
from rwkvq.files import Progress, no_progress
from rwkvq.tensors import is_finite


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found in a sound artifact.

    files: listed files, all with the listed bytes; unlisted: other files of the folder, which nothing reads; tensors:
    checkpoint tensors decoded; weights: their values; stored_bits: of all parts, without headers; file_bytes: size of
    the weight files.
    """

    path: Path
    files: tuple[str, ...]
    unlisted: tuple[str, ...]
    tensors: int
    weights: int
    stored_bits: int
    file_bytes: int


def verify(path: Path, on_tensor: Progress = no_progress) -> VerifyReport:
    """Check everything that can be checked without the float checkpoint; one tensor is in memory at a time.

    Raises ArtifactError for the first problem found.
    """
    artifact = open_artifact(path)
    stored_bits = _count_bits(artifact)
    names = artifact.names()
    weights = 0
    for done, name in enumerate(names, 1):
        weights += _decode(artifact, name)
        on_tensor(name, done, len(names))
    listed = read_sums(path)
    unlisted = sorted(file.name for file in path.iterdir() if file.name not in listed and file.name != SUMS)
    return VerifyReport(
        path, tuple(sorted(listed)), tuple(unlisted), len(names), weights, stored_bits, artifact.file_bytes
    )


def _count_bits(artifact: Artifact) -> int:
    """Bits of all parts, from the headers; each weight must take what its row states."""
    total = 0
    for planned in artifact.plan.tensors:
        found = artifact.stored_bits(planned.name)
        if found != planned.stored_bits:
            raise ArtifactError(
                f"{artifact.path}: {planned.name}: stored in {found} bits, stated {planned.stored_bits};"
                " pack the artifact again"
            )
        total += found
    return total


def _decode(artifact: Artifact, name: str) -> int:
    tensor = artifact.tensor(name)
    shape, dtype = artifact.shape(name), artifact.dtype(name)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ArtifactError(
            f"{artifact.path}: {name} decodes to {list(tensor.shape)}, expected {list(shape)}; report it"
        )
    if not is_finite(tensor):
        raise ArtifactError(f"{artifact.path}: {name} decodes to values that are not finite; pack the artifact again")
    return math.prod(shape)
