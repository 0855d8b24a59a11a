"""The weight files of an artifact: which stored tensor lies in which file, checked from the headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rwkvq import documents
from rwkvq.artifact.layout import FORMAT, INDEX, SINGLE, is_shard_name
from rwkvq.checkpoint.headers import open_safetensors
from rwkvq.errors import ArtifactError

_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One stored tensor as its file's header describes it; dtype is None for one that no format uses."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size; raise ArtifactError naming it if that fails."""
    try:
        return documents.read_json(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing; pack or copy the artifact again") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); pack or copy the artifact again") from error
    except ValueError as error:
        raise ArtifactError(f"{path}: cannot be read as JSON ({error}); pack or copy the artifact again") from error


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every stored tensor by key, from the headers alone: no tensor is read.

    Raises ArtifactError for a missing, truncated or malformed file, an index that names anything but shards of this
    folder or disagrees with them, another format version, a key in two files.
    """
    places = _places(folder)
    found: dict[str, Stored] = {}
    for path in _files(folder, places):
        for key, stored in _header(path).items():
            if key in found:
                raise ArtifactError(f"{path}: {key} is also in {found[key].file.name}; pack the artifact again")
            if places is not None and places.get(key) != path.name:
                raise ArtifactError(f"{path}: holds {key}, which {INDEX} does not place there; pack the artifact again")
            found[key] = stored
    for key in places or ():
        if key not in found:
            raise ArtifactError(f"{folder / INDEX}: lists {key}, which no shard holds; pack the artifact again")
    return found


def _places(folder: Path) -> dict[str, str] | None:
    """File name by key from the index, or None for a single weight file."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() == index.is_file():
        found = "both" if single.is_file() else "neither"
        raise ArtifactError(f"{folder}: holds {found} of {SINGLE} and {INDEX}, expected one; pack the artifact again")
    if single.is_file():
        return None
    values = read_json(index)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places:
        raise ArtifactError(f"{index}: no weight_map of tensors to files; pack or copy the artifact again")
    for key, name in places.items():
        # only names of this pattern are ever joined to the folder, so no path can lead out of it
        if not isinstance(name, str) or not is_shard_name(name):
            raise ArtifactError(
                f"{index}: {key} is in {name!r}, expected a shard of this folder; pack the artifact again"
            )
    return places


def _files(folder: Path, places: dict[str, str] | None) -> list[Path]:
    return [folder / SINGLE] if places is None else [folder / name for name in sorted(set(places.values()))]


def _header(path: Path) -> dict[str, Stored]:
    with _opened(path) as file:
        version = (file.metadata() or {}).get("format")
        if version != FORMAT:
            raise ArtifactError(f"{path}: format is {version!r}, expected {FORMAT!r}; use the rwkvq that wrote it")
        header = {}
        keys: list[str] = file.keys()
        for key in keys:
            part = file.get_slice(key)
            header[key] = Stored(path, _DTYPES.get(str(part.get_dtype())), tuple(part.get_shape()))
        return header


def read_tensors(path: Path, keys: Sequence[str]) -> list[Tensor]:
    """Read tensors of one file. Raises ArtifactError if the file cannot be read."""
    with _opened(path) as file:
        return [file.get_tensor(key) for key in keys]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with open_safetensors(path) as file:
            yield file
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing; pack or copy the artifact again") from error
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise ArtifactError(f"{path}: truncated or damaged ({reason}); pack or copy the artifact again") from error
