"""Hashes of large files, remembered: reading 28 GB to learn that nothing has changed takes minutes.

A file is known again by its path, size, inode and both times. What a remembered hash cannot see (bytes that changed
under the same times) is found by the checksums inside the files themselves.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rwkvq.errors import OutputError
from rwkvq.files import sha256_of_file, write_json

log = logging.getLogger(__name__)

LARGE = 64 << 20
"""Bytes from which on a hash is remembered; smaller files are read each time."""
_SETTLED_NS = 2_000_000_000
"""A file that was written to this shortly before it was hashed may be written to again within one tick of its clock."""
_MAX_ENTRIES = 4096
_LOCK_SECONDS = 10.0


def file_hash(path: Path) -> str:
    """Hex SHA-256 of a file; for a large one, the remembered hash if path, size, times and inode are the same.

    Raises OSError if the file cannot be read.
    """
    before = os.stat(path)
    if before.st_size < LARGE:
        return sha256_of_file(path)
    name, mark = str(path.absolute()), _mark(before)
    known = _read(cache_file()).get(name)
    if isinstance(known, dict) and known.get("mark") == mark and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    now = time.time_ns()
    digest = sha256_of_file(path)
    has_settled = now - max(before.st_mtime_ns, before.st_ctime_ns) >= _SETTLED_NS
    if has_settled and _mark(os.stat(path)) == mark:
        _remember(name, {"mark": mark, "sha256": digest})
    return digest


def cache_file() -> Path:
    """Where hashes are remembered: RWKVQ_CACHE/hashes.json, or rwkvq/hashes.json in the user's cache folder."""
    if folder := os.environ.get("RWKVQ_CACHE"):
        return Path(folder) / "hashes.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkvq" / "hashes.json"


def _mark(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read(file: Path) -> dict[str, Any]:
    """The remembered hashes by path, oldest first; nothing if the file is missing or damaged."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return dict(values["files"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _remember(name: str, entry: dict[str, Any]) -> None:
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name("hashes.lock"), timeout=_LOCK_SECONDS):
            entries = _read(file)
            entries.pop(name, None)
            entries[name] = entry
            write_json(file, {"files": dict(list(entries.items())[-_MAX_ENTRIES:])})
    except (OSError, OutputError, Timeout) as error:
        log.debug("%s: hash of %s is not remembered (%s)", file, name, error)
