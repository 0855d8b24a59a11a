"""Regenerate tests/golden/artifact: `python -m tests.golden.make_artifact`. Review the difference before committing it.

Every byte comes from integer arithmetic, so the folders depend on no random generator and no linear algebra library.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkvq.checkpoint.names import expected_shapes
from rwkvq.checkpoint.spec import ModelSpec, Version
from rwkvq.files import sha256_of_bytes
from tests.packed import codes_of, plan_of, scattered, write_packed
from tests.tiny import tiny_spec

FOLDER = Path(__file__).parent / "artifact"
SHARD_BYTES = {"x060": 16_000, "x070": 1 << 30}
"""The x060 artifact is sharded, the x070 artifact is one file."""


@dataclass(frozen=True)
class ScatteredModel:
    """A model whose tensors are multiples of 1 / 64; bfloat16, [D] vectors."""

    path: Path
    spec: ModelSpec

    def names(self) -> list[str]:
        return list(expected_shapes(self.spec))

    def shape(self, name: str) -> tuple[int, ...]:
        return expected_shapes(self.spec)[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def tensor(self, name: str) -> Tensor:
        return (scattered(name, -64, 65, self.shape(name)) / 64).to(torch.bfloat16)

    def identity(self) -> str:
        return sha256_of_bytes(self.spec.version.encode())


def golden_model(version: Version) -> ScatteredModel:
    """The model of one golden artifact."""
    return ScatteredModel(Path(version), tiny_spec(version, layers=1, width=64, ffn=64, vocab=24))


def write_golden(folder: Path, version: Version) -> Path:
    """Write one golden artifact; returns its folder."""
    model = golden_model(version)
    plan = plan_of(model)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / "vocabulary.txt"
        tokenizer.write_bytes(b"1 'a' 1\n2 'b' 1\n")
        return write_packed(
            folder / version,
            model,
            plan,
            codes_of(plan),
            tokenizer=tokenizer,
            shard_bytes=SHARD_BYTES[version],
            overwrite=True,
        )


if __name__ == "__main__":
    for each in SHARD_BYTES:
        write_golden(FOLDER, each)
