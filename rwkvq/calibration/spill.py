"""Second moments on disk: those of a wide block take more memory together than its weights, and are used one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from rwkvq.errors import ActivationError, OutputError
from rwkvq.files import make_folder

_CHUNK = 64 << 20


class Spilled:
    """A float32 tensor in a file without a name, which is gone when it is no longer held, or when the process ends."""

    def __init__(self, file: IO[bytes], shape: torch.Size) -> None:
        self._file = file
        self._shape = shape

    @classmethod
    def of(cls, parts: Iterable[Tensor], columns: int, folder: Path) -> Spilled:
        """Write contiguous float32 rows [n, columns], part by part, into `folder`. Raises OutputError if refused."""
        rows = 0
        try:
            make_folder(folder)
            file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115 - open as long as this object lives
            for part in parts:
                data = part.view(torch.uint8).view(-1).numpy().data
                while len(data):
                    data = data[file.write(data) :]
                rows += len(part)
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"{folder}: no temporary file for statistics ({reason}); free some space") from error
        return cls(file, torch.Size((rows, columns)))

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        result = torch.empty(self._shape)
        data = result.view(torch.uint8).view(-1).numpy().data
        self._file.seek(0)
        start = 0
        while start < len(data):
            count = self._file.readinto(data[start : start + _CHUNK])  # type: ignore[attr-defined]
            if not count:
                raise ActivationError("temporary file of a second moment: truncated; quantize again")
            start += count
        return result


class Moments(Mapping[str, Tensor]):
    """Second moments by site; one that was put on disk is read at each look, into memory of the reader's own."""

    def __init__(self, by_site: Mapping[str, Tensor | Spilled]) -> None:
        self._by_site = by_site

    def __getitem__(self, site: str) -> Tensor:
        found = self._by_site[site]
        return found.read() if isinstance(found, Spilled) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_site)

    def __len__(self) -> int:
        return len(self._by_site)

    def renamed(self, site_of: Mapping[str, str]) -> Moments:
        """The same by other names: site_of gives the site of each."""
        return Moments({name: self._by_site[site] for name, site in site_of.items()})
