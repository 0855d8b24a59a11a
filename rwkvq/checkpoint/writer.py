"""Write tensors one at a time into a .safetensors file, and export a model as a plain checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from rwkvq.checkpoint.reader import WeightSource
from rwkvq.checkpoint.storage import PICKLE_SUFFIXES
from rwkvq.errors import OutputError
from rwkvq.files import atomic_path
from rwkvq.tensors import is_finite

DATA_ALIGNMENT = 64
"""The header is filled with spaces so that the data begins at a multiple of this many bytes."""
_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}

Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor that will be written."""


def safetensors_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and the absolute offset of each tensor.

    Tensors lie in order of falling element size, then as given, so that each is aligned to its elements although the
    layout allows no gaps. Equal arguments give equal bytes. Raises ValueError for a name given twice.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    begins: dict[str, int] = {}
    position = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: -entry[1].itemsize):
        if name in begins or name == "__metadata__":
            raise ValueError(f"tensor name {name!r} is given twice or reserved")
        begins[name] = position
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + begin for name, begin in begins.items()}


def write_safetensors(
    path: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a .safetensors file atomically, holding one tensor at a time.

    entries announce every tensor; `tensors` yields each exactly once, in any order. Equal arguments give equal bytes.
    Raises OutputError if writing is refused, ValueError if a tensor differs from its entry.
    """
    announced = {name: (dtype, tuple(shape)) for name, dtype, shape in entries}
    header, offsets = safetensors_header(entries, metadata)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            if announced.pop(name, None) != (tensor.dtype, tuple(tensor.shape)):
                raise ValueError(f"{path}: {name} {tensor.dtype} {tuple(tensor.shape)} was not announced like this")
            file.seek(offsets[name])
            _write_data(file, tensor)
        if announced:
            raise ValueError(f"{path}: announced but not given: {', '.join(announced)}")


def _write_data(file: IO[bytes], tensor: Tensor) -> None:
    if tensor.numel():
        file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def export_checkpoint(source: WeightSource, path: Path, *, dtype: torch.dtype | None, overwrite: bool) -> None:
    """Write every tensor of `source` in the released naming and orientation, as .pth or .safetensors by the suffix.

    dtype: of all tensors; None keeps each in its own. A .safetensors is written tensor by tensor, a .pth needs the
    whole model in memory. Raises OutputError: the file exists and `overwrite` is off, the suffix is neither, writing
    is refused, or a value does not fit `dtype`; CheckpointError or ArtifactError if the source is damaged.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: already exists; choose another file or pass --overwrite")
    if path.suffix == ".safetensors":
        entries = [(name, dtype or source.dtype(name), source.shape(name)) for name in source.names()]
        write_safetensors(path, entries, _cast_tensors(source, path, dtype), {"format": "pt"})
    elif path.suffix in PICKLE_SUFFIXES:
        tensors = dict(_cast_tensors(source, path, dtype))
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            _save_pickle(tensors, file)
    else:
        raise OutputError(f"{path}: unknown kind of file {path.suffix!r}, expected .pth, .pt or .safetensors")


class _RememberingFile:
    """A file to write to that remembers why writing was refused."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Hand buffered data to the operating system."""
        self._file.flush()


def _save_pickle(tensors: dict[str, Tensor], file: IO[bytes]) -> None:
    """torch.save into an open file, whose temporary name stays out of the zip: equal models give equal bytes."""
    remembering = _RememberingFile(file)
    try:
        torch.save(tensors, cast(IO[bytes], remembering))
    except RuntimeError as error:
        # torch reports a full disk as an unexpected position
        raise remembering.error or error from error


def _cast_tensors(source: WeightSource, path: Path, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name in source.names():
        tensor = source.tensor(name).to(dtype or source.dtype(name))
        if not is_finite(tensor):
            raise OutputError(f"{path}: {name} has values too large for {tensor.dtype}; export it as bfloat16")
        yield name, tensor
