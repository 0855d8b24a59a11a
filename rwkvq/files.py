"""Files: hashes, atomic writes, run locks. Nothing is ever seen half-written."""

from __future__ import annotations

import errno
import glob
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rwkvq.errors import OutputError

_CHUNK = 1 << 20
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>tmp|old)")
"""Names of atomic_path and atomic_folder while they work."""


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, two spaces of indent and a final newline: equal values give equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write at `path` into OutputError."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full; free some space and run again, finished work is kept",
            errno.EDQUOT: "the disk quota is used up; free some space and run again, finished work is kept",
            errno.EACCES: "no permission to write; choose another folder or change its permissions",
            errno.EPERM: "no permission to write; choose another folder or change its permissions",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.ENOTDIR: "a part of the path is a file; choose another folder",
            errno.EEXIST: "a file of that name is in the way; choose another folder",
            errno.EISDIR: "a folder of that name is in the way; choose another name",
            errno.ENOTEMPTY: "a folder of that name is in the way; choose another name",
            errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
        }.get(error.errno or 0)
        if advice is None:
            raise
        raise OutputError(f"{path}: {advice}") from error


def make_folder(path: Path) -> Path:
    """Create `path` and its parents; return it. Raises OutputError if that is refused."""
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    On any failure, interruption included, the temporary file is removed and `path` is untouched.
    Raises OutputError for a full disk, a read-only or forbidden folder.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _explained(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a read-only disk refuses even this; the reason for the failure matters more
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically."""
    write_text(path, canonical_json(value))


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success rename it to `path`.

    An existing `path` is replaced only with `overwrite`, and only after the new folder is complete.
    Raises OutputError if `path` exists and `overwrite` is off, or if writing is refused.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: already exists; choose another folder or pass --overwrite")
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    try:
        with _explained(path):
            temporary.mkdir()
            yield temporary
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_can_create(path: Path) -> None:
    """Fail before hours of work if `path` could not be created at their end. Raises OutputError."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise OutputError(f"{path}: a part of the path is a file ({there}); choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: no permission to write in {there}; choose another folder")


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files and folders that a killed run left in `folder` (call it only under the run lock)."""
    for leftover in [path for path in folder.rglob(".*") if _LEFTOVER.fullmatch(path.name)]:
        _remove(leftover)


def recover_folder(path: Path) -> None:
    """Clear what a kill inside `atomic_folder(path)` left beside `path`; a folder that was moved away comes back."""
    for leftover in list(path.absolute().parent.glob(f".{glob.escape(path.name)}.*")):
        found = _LEFTOVER.fullmatch(leftover.name)
        if found is None or found["name"] != path.name:
            continue
        if found["kind"] == "old" and not path.exists():
            os.replace(leftover, path)
        else:
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the one lock of a run folder; the operating system frees it when the process dies.

    Raises OutputError if another run holds it.
    """
    make_folder(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    with _explained(folder):
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(f"{folder}: another run is using this folder; wait for it or choose another") from error
    try:
        yield
    finally:
        lock.release()


def code_version(modules: Iterable[str]) -> str:
    """Hex sha256 over the Python sources of `modules` (dotted names; a package stands for every file below it).

    The order of `modules` does not matter. Raises ModuleNotFoundError for a name that does not exist.
    """
    sources: dict[str, Path] = {}
    for module in modules:
        sources.update(_sources(module))
    digest = hashlib.sha256()
    for name in sorted(sources):
        content = sources[name].read_bytes()
        # lengths keep two different lists of files from giving the same stream
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _sources(module: str) -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, file) of a module, or of every module of a package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module {module}")
    origin = Path(spec.origin)
    if spec.submodule_search_locations is None:
        yield module, origin
        return
    for file in origin.parent.rglob("*.py"):
        yield ".".join((module, *file.relative_to(origin.parent).with_suffix("").parts)), file


Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total) whenever a unit of a stage is finished."""


def no_progress(what: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""
