"""Storages: the tensors of a .pth, a .safetensors file or a folder of shards, one at a time, none loaded at opening."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rwkvq.errors import CheckpointError

PICKLE_SUFFIXES = (".pth", ".pt")
MAX_INDEX_BYTES = 64 << 20
"""An index lists at most some thousand names; anything larger is refused unread."""
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_SHARD = re.compile(r"^(.*-)(\d{5})-of-(\d{5})\.safetensors$")


class Storage(Protocol):
    """Tensors by the names in the file; `files` are the files that hold them, in a fixed order."""

    files: tuple[Path, ...]

    def names(self) -> list[str]:
        """Names as in the file."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as in the file."""

    def dtype(self, name: str) -> torch.dtype | str:
        """The dtype, or its name in the file if it is none that a model may have."""

    def tensor(self, name: str) -> Tensor:
        """The tensor, as stored."""


def open_storage(path: Path) -> Storage:
    """Open a model file or folder. Raises CheckpointError: not there, not readable, damaged, or of unknown kind."""
    try:
        if path.is_dir():
            return SafetensorsStorage(*_shards_of(path))
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file or folder")
        if path.suffix in PICKLE_SUFFIXES:
            return PickleStorage(path)
        if path.suffix == ".safetensors":
            return SafetensorsStorage([path], None)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    raise CheckpointError(f"{path}: unknown kind of file, expected .pth, .pt, .safetensors or a folder of .safetensors")


class PickleStorage:
    """A dictionary of tensors written by torch.save; zip files are memory-mapped, legacy ones are loaded."""

    def __init__(self, path: Path) -> None:
        self.files: tuple[Path, ...] = (path,)
        self._tensors = {name: _plain(path, name, value) for name, value in _load_pickle(path).items()}

    def names(self) -> list[str]:
        """Names as in the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as in the file."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | str:
        """The dtype, or its name if no model may have it."""
        dtype = self._tensors[name].dtype
        return dtype if dtype in _DTYPES.values() else str(dtype).removeprefix("torch.")

    def tensor(self, name: str) -> Tensor:
        """The tensor, a view of the mapped file: not to be written to."""
        return self._tensors[name]


def _load_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a .pth; no code in it is ever run. Raises CheckpointError."""
    with path.open("rb") as file:
        starts_as_zip = file.read(2) == b"PK"
    is_zip = zipfile.is_zipfile(path)
    if starts_as_zip and not is_zip:
        raise CheckpointError(f"{path}: truncated or damaged (the zip directory at its end is missing); copy it again")
    try:
        with warnings.catch_warnings():
            # a foreign pickle also draws a warning; the refusal below says all
            warnings.simplefilter("ignore", UserWarning)
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_pickle_refusal(str(error))}") from error
    except (RuntimeError, ValueError, KeyError, EOFError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({_first_line(error)}); copy it again") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, expected a dictionary of tensors by name")
    return values


def _pickle_refusal(message: str) -> str:
    """torch explains itself in paragraphs; keep what it found."""
    if match := re.search(r"GLOBAL (\S+)", message):
        found = match.group(1)
        return f"the pickle wants to do more than load tensors ({found}); refused, nothing was run; use a .safetensors"
    return "truncated or damaged (not a pickle of plain tensors; nothing was run); copy it again or use a .safetensors"


def _plain(path: Path, name: str, value: Any) -> Tensor:
    """`value` if it is an ordinary tensor whose file holds all its elements; raise CheckpointError if not."""
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"{path}: {name} is a {type(value).__name__}, expected a tensor; save the state_dict only"
        )
    if value.layout != torch.strided or value.device.type != "cpu":
        raise CheckpointError(f"{path}: {name} is sparse or has no data, expected a dense tensor")
    # a stride of 0 lets a few bytes claim any size
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {name} claims {value.numel()} elements, more than the file holds")
    return value.detach()


class SafetensorsStorage:
    """One or more .safetensors files; each is mapped by the safetensors library, which checks its header.

    index: file name by tensor name, to be proved against the files; None without an index.
    """

    def __init__(self, paths: Sequence[Path], index: dict[str, str] | None) -> None:
        self.files: tuple[Path, ...] = tuple(paths)
        self._handles: dict[str, Any] = {}
        for path in paths:
            handle = _open_safetensors(path)
            names: list[str] = list(handle.keys())
            for name in names:
                if name in self._handles:
                    raise CheckpointError(f"{path}: holds {name}, which another shard holds too; remove one of them")
                if index is not None and index.get(name) != path.name:
                    raise CheckpointError(f"{path}: holds {name}, which the index does not place there; fix the index")
                self._handles[name] = handle
        absent = [name for name in index or () if name not in self._handles]
        if index and absent:
            where = paths[0].with_name(index[absent[0]])
            raise CheckpointError(f"{where}: {absent[0]} is missing although the index lists it; copy the shard again")

    def names(self) -> list[str]:
        """Names as in the files."""
        return list(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as in the file."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | str:
        """The dtype, or its name if no model may have it."""
        found = str(self._handles[name].get_slice(name).get_dtype())
        return _DTYPES.get(found, found)

    def tensor(self, name: str) -> Tensor:
        """The tensor, as stored."""
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({_first_line(error)}); copy it again") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: this shard is missing; copy it beside the others") from error


def _shards_of(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The shards of a folder, by its index if it has one. Raises CheckpointError."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder}: {len(indices)} index files, expected one; remove the others")
    if indices:
        index = _read_index(indices[0])
        return [folder / name for name in sorted(set(index.values()))], index
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no .safetensors files; name the model file itself if it is a .pth")
    for path in paths:
        if match := _SHARD.match(path.name):
            for number in range(1, int(match.group(3)) + 1):
                shard = folder / f"{match.group(1)}{number:05d}-of-{match.group(3)}.safetensors"
                if not shard.is_file():
                    raise CheckpointError(f"{shard}: this shard is missing; copy it beside the others")
    return paths, None


def _read_index(path: Path) -> dict[str, str]:
    """File name by tensor name; only plain names of files in the same folder. Raises CheckpointError."""
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_INDEX_BYTES} bytes, which no index is; copy it again")
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index (no JSON object with a weight_map); copy it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is no mapping of tensors to files, or is empty; copy it again")
    for name, file in weight_map.items():
        is_plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\:\0\n\r")
        if not is_plain:
            raise CheckpointError(f"{path}: {name} is placed in {file!r}, expected a .safetensors of the same folder")
    return weight_map


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
