"""SHA256SUMS of an artifact folder, in the format of the `sha256sum` program."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from rwkvq.artifact.layout import SUMS
from rwkvq.errors import ArtifactError
from rwkvq.files import sha256_of_file, write_text

_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_][A-Za-z0-9_.-]*)")
MAX_BYTES = 1 << 20
"""One short line a file; anything larger is refused unread."""


def write_sums(folder: Path) -> None:
    """List every file of `folder`, sorted by name."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    write_text(folder / SUMS, "".join(f"{sha256_of_file(file)}  {file.name}\n" for file in files))


def read_sums(folder: Path) -> dict[str, str]:
    """Hex sha256 by file name; raise ArtifactError if the list is missing or malformed. No file is hashed yet."""
    path = folder / SUMS
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ArtifactError(f"{path}: {size} bytes, expected at most {MAX_BYTES}; get the artifact again")
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing, so this is no complete artifact; pack or copy it again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read as text; get the artifact again") from error
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
