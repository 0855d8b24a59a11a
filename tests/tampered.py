"""Artifacts that somebody changed with care: other bytes, checksums that fit them, so that `verify` passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvq.artifact.sums import write_sums


def flip(artifact: Path, key: str) -> None:
    """Change the lowest bit of the first byte of one stored tensor, and renew the checksums."""
    path = artifact / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    begin = 8 + size + json.loads(data[8 : 8 + size])[key]["data_offsets"][0]
    data[begin] ^= 1
    path.write_bytes(data)
    write_sums(artifact)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change one JSON file of an artifact, and renew the checksums."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    write_sums(path.parent)
