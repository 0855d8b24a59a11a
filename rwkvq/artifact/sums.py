"""SHA256SUMS of an artifact folder, in the format of the `sha256sum` program."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from rwkvq.artifact.layout import SUMS
from rwkvq.documents import check_member, read_text
from rwkvq.errors import ArtifactError
from rwkvq.files import sha256_of_file, write_text

_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_][A-Za-z0-9_.-]*)")
MAX_BYTES = 1 << 20
"""One short line a file; anything larger is refused unread."""
MAX_FILES = 10_000
"""An artifact has some ten files; a folder of many more is something else."""


def write_sums(folder: Path) -> None:
    """List every file of `folder`, sorted by name."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    write_text(folder / SUMS, "".join(f"{sha256_of_file(file)}  {file.name}\n" for file in files))


def files_of(folder: Path) -> list[Path]:
    """Every file right in `folder`, by name; each is a regular file of the folder, so that it is safe to open.

    Raises ArtifactError for a link that leads out of the folder (but for the Hugging Face cache's own), a pipe, a
    device, too many files. Folders in it are left out, nothing reads them.
    """
    try:
        entries = sorted(islice(folder.iterdir(), MAX_FILES + 1))
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be read ({error.strerror}); check the path") from error
    if len(entries) > MAX_FILES:
        raise ArtifactError(f"{folder}: more than {MAX_FILES} files, so this is no artifact; check the path")
    files = [path for path in entries if path.is_symlink() or not path.is_dir()]
    for path in files:
        try:
            check_member(folder, path)
        except FileNotFoundError as error:
            raise ArtifactError(f"{path}: a link to nothing; pack or copy the artifact again") from error
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: {error}; remove it, pack or copy the artifact again") from error
    return files


def read_sums(folder: Path) -> dict[str, str]:
    """Hex sha256 by file name, after files_of proved that all files of `folder` are safe to open; none is hashed yet.

    Raises ArtifactError if that fails, or if the list is missing or malformed.
    """
    path = folder / SUMS
    files_of(folder)
    try:
        text = read_text(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing, so this is no complete artifact; pack or copy it again") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as text ({error}); get the artifact again") from error
    sums: dict[str, str] = {}
    if not text.endswith("\n"):
        raise ArtifactError(f"{path}: its last line has no end; get the artifact again")
    for number, line in enumerate(text[:-1].split("\n"), 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise ArtifactError(f"{path}: line {number} is no hash with a new file name; get the artifact again")
        sums[match[2]] = match[1]
    return sums


def check_sums(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> None:
    """Raise ArtifactError for the first of `names` that is not listed, missing, or holds other bytes than listed."""
    for name in names:
        path = folder / name
        if name not in sums:
            raise ArtifactError(f"{path}: not listed in {SUMS}; pack or copy the artifact again")
        try:
            found = sha256_of_file(path)
        except FileNotFoundError as error:
            raise ArtifactError(f"{path}: missing although {SUMS} lists it; pack or copy the artifact again") from error
        except OSError as error:
            raise ArtifactError(
                f"{path}: cannot be read ({error.strerror}); pack or copy the artifact again"
            ) from error
        if found != sums[name]:
            raise ArtifactError(f"{path}: damaged, its bytes differ from {SUMS}; pack or copy the artifact again")
