"""Storages: the tensors of a .pth, a .safetensors file or a folder of shards, one at a time, none loaded at opening."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rwkvq.checkpoint.archives import NO_DIRECTORY, read_pickle
from rwkvq.checkpoint.headers import open_safetensors
from rwkvq.checkpoint.pickles import MAX_PICKLE_BYTES, ForeignCodeError, check_legacy, check_pickle
from rwkvq.documents import check_member, read_json
from rwkvq.errors import CheckpointError

PICKLE_SUFFIXES = (".pth", ".pt")
MAX_NAME = 200
"""Characters of a tensor's name; those of RWKV have up to forty."""
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_DAMAGE = (RuntimeError, ValueError, KeyError, EOFError, TypeError, AttributeError, IndexError, MemoryError)
"""What torch raises for files that are not what they seem."""
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
    if not path.name.isprintable():
        raise CheckpointError(f"{path}: the name holds characters that cannot be shown; rename it")
    try:
        storage = _storage_of(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    for name in storage.names():
        # a weight's name becomes the name of a file in the run folder
        if len(name) > MAX_NAME or not name.isprintable() or set(name) & set("/\\") or ".." in name:
            raise CheckpointError(f"{path}: a tensor is named {name[:MAX_NAME]!r}; rename it or use another file")
    return storage


def _storage_of(path: Path) -> Storage:
    if path.is_dir():
        return SafetensorsStorage(*_shards_of(path))
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; check the path")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file; name a model file or a folder of .safetensors")
    if path.suffix in PICKLE_SUFFIXES:
        return PickleStorage(path)
    if path.suffix == ".safetensors":
        return SafetensorsStorage([path], None)
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
    is_zip = _check_unread(path)
    try:
        with warnings.catch_warnings():
            # a foreign pickle also draws a warning; the refusal below says all
            warnings.simplefilter("ignore", UserWarning)
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (*_DAMAGE, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({_first_line(error)}); copy it again") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, expected tensors by name; save the state_dict")
    return values


def _check_unread(path: Path) -> bool:
    """True for a zip file, False for the legacy format; raise CheckpointError for what must not be loaded."""
    with path.open("rb") as file:
        start = file.read(MAX_PICKLE_BYTES)
    is_zip = start.startswith(b"PK")
    try:
        if is_zip:
            check_pickle(read_pickle(path))
        else:
            check_legacy(start, path.stat().st_size)
    except ForeignCodeError as error:
        found = f"the pickle wants to do more than load tensors ({error})"
        raise CheckpointError(f"{path}: {found}; refused, nothing was run; use a .safetensors") from error
    except ValueError as error:
        advice = "copy it again" if str(error) == NO_DIRECTORY else "copy it again or use a .safetensors"
        raise CheckpointError(f"{path}: truncated or damaged ({_first_line(error)}); {advice}") from error
    return is_zip


def _plain(path: Path, name: str, value: Any) -> Tensor:
    """`value` if it is an ordinary tensor whose file holds all its elements; raise CheckpointError if not."""
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"{path}: {name} is a {type(value).__name__}, expected a tensor; save the state_dict only"
        )
    if value.layout != torch.strided or value.device.type != "cpu":
        raise CheckpointError(f"{path}: {name} is sparse or has no data; copy its values")
    # a stride of 0 lets a few bytes claim any size
    if math.prod(value.shape) * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name} claims {math.prod(value.shape)} elements, more than the file holds; copy it again"
        )
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
        return open_safetensors(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: this shard is missing; copy it beside the others") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: truncated or damaged ({_first_line(error)}); copy it again") from error


def _shards_of(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The shards of a folder, by its index if it has one. Raises CheckpointError."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder}: {len(indices)} index files, expected one; remove the others")
    if indices:
        _check_member(folder, indices[0])
        index = _read_index(indices[0])
        paths = [folder / name for name in sorted(set(index.values()))]
        for path in paths:
            _check_member(folder, path)
        return paths, index
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no .safetensors files; name the model file itself if it is a .pth")
    for path in paths:
        _check_member(folder, path)
        if match := _SHARD.match(path.name):
            for number in range(1, int(match.group(3)) + 1):
                shard = folder / f"{match.group(1)}{number:05d}-of-{match.group(3)}.safetensors"
                if not shard.is_file():
                    raise CheckpointError(f"{shard}: this shard is missing; copy it beside the others")
    return paths, None


def _check_member(folder: Path, path: Path) -> None:
    """Raise CheckpointError unless `path` is a file of the folder, or a link that stays in it or in its cache."""
    try:
        check_member(folder, path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: this shard is missing; copy it beside the others") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; copy the file itself into the folder") from error


def _read_index(path: Path) -> dict[str, str]:
    """File name by tensor name; only plain names of files in the same folder. Raises CheckpointError."""
    try:
        weight_map = read_json(path)["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        reason = _first_line(error) if isinstance(error, ValueError) else "no JSON object with a weight_map"
        raise CheckpointError(f"{path}: not an index ({reason}); copy it again") from error
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
