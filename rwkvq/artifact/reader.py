"""Read an artifact: everything about names, shapes, dtypes and sizes is checked before a tensor is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvq.artifact.layout import (
    CONFIG,
    PROVENANCE,
    QUANTIZATION,
    SUMS,
    TOKENIZER_SUFFIXES,
    entries_of,
)
from rwkvq.artifact.quantization import read_quantization
from rwkvq.artifact.shards import Stored, read_headers, read_json, read_tensors
from rwkvq.artifact.sums import check_sums, read_sums
from rwkvq.checkpoint.names import Weight, assemble, weights_of
from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.errors import ArtifactError
from rwkvq.files import sha256_of_bytes
from rwkvq.formats import DenseLayout, decode_parts
from rwkvq.formats.dense import DTYPES
from rwkvq.plan.plan import Plan


class Artifact:
    """An opened artifact; a WeightSource whose tensors are decoded one at a time, when they are asked for.

    plan: the plan it was packed from; errors: figures by weight name, none for kept weights.
    """

    def __init__(self, path: Path, plan: Plan, errors: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        self.path = path
        self.spec: ModelSpec = plan.spec
        self.plan = plan
        self.errors = dict(errors)
        self._stored = dict(stored)
        self._shapes = {planned.tensor: planned.tensor_shape for planned in plan.tensors}
        self._weights = _weights_by_tensor(plan.spec, self._shapes)
        self._planned = {planned.name: planned for planned in plan.tensors}

    def names(self) -> list[str]:
        """Tensor names in the released naming and order."""
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape that tensor() returns; raises ArtifactError for an unknown name."""
        self._weights_of(name)
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """float32 for quantized tensors, the stored dtype for kept ones."""
        layouts = [self._planned[weight.name].layout for weight in self._weights_of(name)]
        dtypes = {DTYPES[layout.dtype] if isinstance(layout, DenseLayout) else torch.float32 for layout in layouts}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def tensor(self, name: str) -> Tensor:
        """Decode one tensor, in checkpoint orientation and shape; every value is finite.

        Raises ArtifactError naming file and tensor if its parts hold values that the format excludes.
        """
        weights, dtype = self._weights_of(name), self.dtype(name)
        parts = {weight.name: self.weight(weight.name).to(dtype) for weight in weights}
        return assemble(parts, weights, self._shapes[name])

    def weight(self, name: str) -> Tensor:
        """Decode one weight as it was quantized: [out, in], [size], or as stored if kept. Raises ArtifactError."""
        planned = self._planned.get(name)
        if planned is None:
            raise ArtifactError(f"{self.path}: no weight {name}; its names are in {QUANTIZATION}")
        keys = [key for key, _, _ in entries_of(planned)]
        file = self._stored[keys[0]].file
        parts = dict(zip(planned.layout.parts(), read_tensors(file, keys), strict=True))
        try:
            return decode_parts(planned.layout, parts)
        except ArtifactError as error:
            raise ArtifactError(f"{file}: {name}: {error}") from error

    def identity(self) -> str:
        """Hex SHA-256 over names and listed hashes of quantization.json and the weight files."""
        sums = read_sums(self.path)
        names = [QUANTIZATION, *self.weight_files]
        return sha256_of_bytes("".join(f"{sums[name]}  {name}\n" for name in names).encode())

    @property
    def weight_files(self) -> list[str]:
        """Names of the files that hold tensors, in order."""
        return sorted({stored.file.name for stored in self._stored.values()})

    @property
    def file_bytes(self) -> int:
        """Size of the weight files in bytes, headers included: what `file bits` counts (docs/method.md 8)."""
        return sum((self.path / name).stat().st_size for name in self.weight_files)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer file of the folder, or None if it was packed without one."""
        candidates = [self.path / f"tokenizer{suffix}" for suffix in TOKENIZER_SUFFIXES]
        return next((path for path in candidates if path.is_file()), None)

    def provenance(self) -> dict[str, Any]:
        """What the artifact came from. Raises ArtifactError if provenance.json is missing or damaged."""
        values: dict[str, Any] = read_json(self.path / PROVENANCE)
        return values

    def stored_bits(self, name: str) -> int:
        """Bits that the parts of a weight take in the files, counted from the headers."""
        stored = [self._stored[key] for key, _, _ in entries_of(self._planned[name])]
        return sum(8 * part.dtype.itemsize * math.prod(part.shape) for part in stored if part.dtype is not None)

    def _weights_of(self, name: str) -> list[Weight]:
        if name not in self._weights:
            raise ArtifactError(f"{self.path}: no tensor {name} in a model of version {self.spec.version}")
        return self._weights[name]


def open_artifact(path: Path, *, checksums: bool = True) -> Artifact:
    """Open an artifact folder; no tensor is read yet.

    checksums: compare every weight file with SHA256SUMS first, which reads it once; the small files always are.
    Raises ArtifactError for anything that is missing, truncated, damaged, of another format version, or that does not
    fit the rest: shapes and dtypes of all parts are compared with quantization.json before anything is allocated.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such folder; give the folder that rwkvq wrote")
    sums = read_sums(path)
    small = [name for name in sums if not name.endswith(".safetensors")]
    check_sums(path, sums, dict.fromkeys([CONFIG, QUANTIZATION, PROVENANCE, *small]))
    plan, errors = read_quantization(path)
    stored = read_headers(path)
    files = sorted({entry.file.name for entry in stored.values()})
    absent = next((name for name in files if name not in sums), None)
    if absent is not None:
        raise ArtifactError(f"{path / absent}: not listed in {SUMS}; pack or copy the artifact again")
    _check_parts(path, plan, stored)
    if checksums:
        check_sums(path, sums, files)
    return Artifact(path, plan, errors, stored)


def _check_parts(path: Path, plan: Plan, stored: Mapping[str, Stored]) -> None:
    """Raise ArtifactError unless the files hold exactly the parts that the layouts name, by dtype and shape."""
    expected = {key: (dtype, shape) for planned in plan.tensors for key, dtype, shape in entries_of(planned)}
    for key, (dtype, shape) in expected.items():
        found = stored.get(key)
        if found is None:
            raise ArtifactError(f"{path}: {key} is missing; pack or copy the artifact again")
        if (found.dtype, found.shape) != (dtype, shape):
            raise ArtifactError(
                f"{found.file}: {key} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)};"
                " pack the artifact again"
            )
    for key, entry in stored.items():
        if key not in expected:
            raise ArtifactError(f"{entry.file}: {key} is not listed in {QUANTIZATION}; pack the artifact again")


def _weights_by_tensor(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Weight]]:
    grouped: dict[str, list[Weight]] = {}
    for weight in weights_of(spec, shapes):
        grouped.setdefault(weight.tensor, []).append(weight)
    return grouped
