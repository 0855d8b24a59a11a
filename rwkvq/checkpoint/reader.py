"""Read float checkpoints tensor by tensor; everything about names, shapes and dtypes is checked when one is opened."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rwkvq.checkpoint.names import expected_shapes, unused_tensors
from rwkvq.checkpoint.pages import private_copy
from rwkvq.checkpoint.spec import ModelSpec, spec_of
from rwkvq.checkpoint.storage import Storage, open_storage
from rwkvq.checkpoint.variants import refusal
from rwkvq.errors import CheckpointError
from rwkvq.hashes import file_hash
from rwkvq.tensors import is_finite

MAX_PROBLEMS = 8
"""Problems spelled out in one message; the rest is counted."""
_PREFIX = re.compile(r"^(model|rwkv7|rwkv)\.")


class WeightSource(Protocol):
    """Where weights come from: a float checkpoint or an artifact."""

    path: Path
    spec: ModelSpec

    def names(self) -> list[str]:
        """Tensor names in the released naming and order, without a prefix; unused tensors are left out."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape; vectors may be [1, 1, D] or [D]."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of what tensor() returns."""

    def tensor(self, name: str) -> Tensor:
        """One tensor in checkpoint orientation and shape, all values finite; not to be written to."""

    def identity(self) -> str:
        """Hex SHA-256 of the model's bytes."""


class Checkpoint:
    """An opened float checkpoint: complete, of known version, every shape and dtype as its version demands.

    unused: tensors in the file that no computation reads (x070 blocks.0.att.v0, v1, v2).
    """

    def __init__(self, path: Path, spec: ModelSpec, storage: Storage, stored_names: Mapping[str, str]) -> None:
        self.path = path
        self.spec = spec
        self.unused: tuple[str, ...] = tuple(unused_tensors(spec, stored_names))
        self._storage = storage
        self._stored_names = {name: stored_names[name] for name in expected_shapes(spec)}
        self._identity: str | None = None

    def names(self) -> list[str]:
        """Tensor names in the released naming and order, without a prefix; unused tensors are left out."""
        return list(self._stored_names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape; raises CheckpointError for an unknown name."""
        return self._storage.shape(self._stored(name))

    def dtype(self, name: str) -> torch.dtype:
        """float16, bfloat16 or float32; raises CheckpointError for an unknown name."""
        dtype = self._storage.dtype(self._stored(name))
        assert isinstance(dtype, torch.dtype)
        return dtype

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, contiguous, in memory of its own: no page of the file stays in memory.

        Raises CheckpointError naming the tensor if a value is NaN or infinite.
        """
        tensor = private_copy(self._storage.tensor(self._stored(name)))
        if not is_finite(tensor):
            raise CheckpointError(f"{self.path}: {name} holds NaN or infinite values; use an undamaged checkpoint")
        return tensor

    def identity(self) -> str:
        """Hex SHA-256 of the file, or for shards of their names and hashes; read once, then remembered."""
        if self._identity is None:
            hashes = [(file.name, file_hash(file)) for file in self._storage.files]
            listing = "".join(f"{digest}  {name}\n" for name, digest in hashes)
            single = len(hashes) == 1 and self.path.is_file()
            self._identity = hashes[0][1] if single else hashlib.sha256(listing.encode()).hexdigest()
        return self._identity

    def _stored(self, name: str) -> str:
        if name not in self._stored_names:
            raise CheckpointError(f"{self.path}: no tensor {name} in a model of version {self.spec.version}")
        return self._stored_names[name]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .pth, .pt or .safetensors file or a folder of .safetensors shards; no weight is read yet.

    Names may carry the prefix model., rwkv7. or rwkv. Raises CheckpointError, one line with all problems found: a
    damaged file, a known but unsupported variant, tensors that are missing, unknown, of wrong shape or dtype.
    """
    storage = open_storage(path)
    if variant := refusal(storage.names()):
        raise CheckpointError(f"{path}: {variant}")
    stored_names: dict[str, str] = {}
    for stored in storage.names():
        name = _PREFIX.sub("", stored)
        if name in stored_names:
            raise CheckpointError(f"{path}: holds both {stored_names[name]} and {stored}; remove one of them")
        stored_names[name] = stored
    try:
        spec = spec_of({name: storage.shape(stored) for name, stored in stored_names.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if problems := _problems(spec, storage, stored_names):
        more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        listed = "; ".join(problems[:MAX_PROBLEMS])
        raise CheckpointError(f"{path}: not a complete plain {spec.version} checkpoint: {listed}{more}")
    return Checkpoint(path, spec, storage, stored_names)


def _problems(spec: ModelSpec, storage: Storage, stored_names: Mapping[str, str]) -> list[str]:
    """All that is wrong with names, shapes and dtypes."""
    expected = expected_shapes(spec)
    known = expected.keys() | set(unused_tensors(spec, stored_names))
    problems = [f"{name} is missing" for name in expected if name not in stored_names]
    problems += [f"{name[:120]!r} is unknown" for name in stored_names if name not in known]
    for name, shape in expected.items():
        if (stored := stored_names.get(name)) is None:
            continue
        found = storage.shape(stored)
        if found != shape and not (len(shape) == 1 and found == (1, 1, *shape)):
            problems.append(f"{name} is {list(found)}, expected {list(shape)}")
        dtype = storage.dtype(stored)
        if not isinstance(dtype, torch.dtype):
            problems.append(f"{name} is {dtype}, expected float16, bfloat16 or float32")
    return problems
