"""Proof, before torch reads it, that a .pth is the plain zip file that torch.save writes: stored entries, no lies.

torch allocates what an entry claims to hold. Here every claim is compared with the size of the file, from the zip
directory and the entries' own headers; only the pickle is read.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from rwkvq.checkpoint.pickles import MAX_PICKLE_BYTES

MAX_ENTRIES = 100_000
"""One a tensor, and a few; the largest RWKV has about two thousand tensors."""
MAX_DIRECTORY_BYTES = 16 << 20
NO_DIRECTORY = "the zip directory at its end is missing"

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")


def read_pickle(path: Path) -> bytes:
    """The pickle of a zip file of torch.save. Raises ValueError, a reason of one line, for any other zip file."""
    with path.open("rb") as file:
        end, count = _directory(file)
        try:
            # the directory is known to be small, so this reads and builds little
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeError) as error:
            raise ValueError(f"its zip directory is damaged: {error}") from error
        if len(entries) != count or not entries:
            raise ValueError(f"its zip directory lists {len(entries)} entries, expected {count}")
        _check_entries(entries)
        starts = _check_places(file, entries, end)
        folder = entries[0].filename.partition("/")[0]
        found = next((at for at, entry in enumerate(entries) if entry.filename == f"{folder}/data.pkl"), None)
        if found is None:
            raise ValueError("no data.pkl in it, which torch.save always writes")
        size = entries[found].file_size
        if size > MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl takes {size} bytes, at most {MAX_PICKLE_BYTES} are read")
        file.seek(starts[found])
        return file.read(size)


def _directory(file: BinaryIO) -> tuple[int, int]:
    """Where the entries end and how many there are.

    Different programs find different directories in an odd file; torch.save puts it right before the end, and so must
    this file.
    """
    size = file.seek(0, os.SEEK_END)
    tail_size = min(size, _END.size + _LOCATOR.size + _END64.size)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\5\6":
        raise ValueError(NO_DIRECTORY)
    _, disk, first_disk, here, count, length, offset, comment = _END.unpack(tail[-_END.size :])
    end, is_plain = size - _END.size, not disk and not first_disk and not comment and here == count
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\6\7":
        short = (count, length, offset)
        end -= _LOCATOR.size + _END64.size
        if end < 0 or tail[:4] != b"PK\6\6":
            raise ValueError(NO_DIRECTORY)
        _, disk, place, disks = _LOCATOR.unpack(locator)
        _, rest, _, _, disk64, first64, here, count, length, offset = _END64.unpack(tail[: _END64.size])
        is_plain &= not disk and not disk64 and not first64 and disks <= 1 and rest == _END64.size - 12
        is_plain &= place == end and here == count
        is_plain &= short == (min(count, 0xFFFF), min(length, 0xFFFFFFFF), min(offset, 0xFFFFFFFF))
    if count > MAX_ENTRIES or length > MAX_DIRECTORY_BYTES:
        raise ValueError(f"its zip directory has {count} entries in {length} bytes, more than any model")
    if not is_plain or offset + length != end:
        raise ValueError("its zip directory is damaged: places and sizes do not fit")
    return offset, count


def _check_entries(entries: Sequence[zipfile.ZipInfo]) -> None:
    """Raise ValueError unless each entry is stored as it is, under a name of its own."""
    seen: set[str] = set()
    for entry in entries:
        name = entry.orig_filename
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"its entry {name[:80]!r} is compressed, which torch.save never does")
        if entry.flag_bits & 1:
            raise ValueError(f"its entry {name[:80]!r} is encrypted")
        # torch compares names without case
        if name.casefold() in seen or name != entry.filename or not name.isprintable():
            raise ValueError(f"its entry {name[:80]!r} is there twice or oddly named")
        seen.add(name.casefold())


def _check_places(file: BinaryIO, entries: Sequence[zipfile.ZipInfo], end: int) -> list[int]:
    """Where the bytes of each entry start. Raises ValueError unless all lie in the file, none in another."""
    starts = []
    for entry in entries:
        file.seek(entry.header_offset)
        header = file.read(_LOCAL.size)
        if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
            raise ValueError(f"its entry {entry.filename[:80]!r} is not where the zip directory says")
        *_, name, extra = _LOCAL.unpack(header)
        starts.append(entry.header_offset + _LOCAL.size + name + extra)
    order = sorted(range(len(entries)), key=lambda at: entries[at].header_offset)
    limits = [entries[at].header_offset for at in order[1:]] + [end]
    for at, limit in zip(order, limits, strict=True):
        if starts[at] + entries[at].file_size > limit:
            raise ValueError(f"its entry {entries[at].filename[:80]!r} claims bytes of another or beyond the file")
    return starts
