"""The file of one quantized tensor: its packed parts, the key of the work that made it, and its error row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from rwkvq.checkpoint.headers import open_safetensors
from rwkvq.checkpoint.writer import write_safetensors
from rwkvq.files import sha256_of_bytes


@dataclass(frozen=True, slots=True)
class TensorError:
    """What quantization did to one weight.

    weight_error: ||W - Q||^2 / ||W||^2. output_error: tr(dW H dW^T) / tr(W H W^T), with H the second moment of the
    weight's own input on the calibration windows (element-wise: sum s dw^2 / sum s w^2); None without statistics.
    """

    weight_error: float
    output_error: float | None


def tensor_path(folder: Path, name: str) -> Path:
    """File of one quantized tensor."""
    return folder / f"{name}.safetensors"


def read_done(path: Path, key: str) -> TensorError | None:
    """The error row of a finished tensor, or None if `path` is not the result of the work `key`."""
    if not path.is_file():
        return None
    try:
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            digest = digest_of({name: file.get_tensor(name) for name in sorted(file.keys())})
        return TensorError(**json.loads(metadata["error"])) if metadata.get("digest") == digest else None
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def digest_of(parts: Mapping[str, Tensor]) -> str:
    """Hash of names and bytes of the parts."""
    data = b"".join(
        name.encode() + parts[name].contiguous().view(torch.uint8).numpy().tobytes() for name in sorted(parts)
    )
    return sha256_of_bytes(data)


def write_result(path: Path, parts: Mapping[str, Tensor], key: str, error: TensorError) -> None:
    """Write the packed parts of a tensor, the result of the work `key`, atomically. Raises OutputError."""
    metadata = {"key": key, "digest": digest_of(parts), "error": json.dumps(asdict(error), sort_keys=True)}
    entries = [(name, part.dtype, tuple(part.shape)) for name, part in sorted(parts.items())]
    write_safetensors(path, entries, sorted(parts.items()), metadata)
