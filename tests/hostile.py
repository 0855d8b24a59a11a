"""Files made to harm who reads them: zip files with lies, pickles that fill the memory, headers that overlap."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.errors import CheckpointError
from tests.tiny import tiny_tensors

END = struct.Struct("<4s4H2LH")
END64_AT = -98
"""torch.save ends with a zip64 record (56 bytes), its locator (20) and the end record (22)."""


def zip_with(
    path: Path,
    *,
    pickled: bytes | None = None,
    compression: int = zipfile.ZIP_STORED,
    more: Callable[[zipfile.ZipFile], object] = lambda archive: None,
) -> Path:
    """Write a .pth like torch.save's by other means: with another pickle, compressed, or with more entries."""
    buffer = io.BytesIO()
    torch.save(tiny_tensors("x070"), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", compression) as target:
        for entry in source.infolist():
            is_pickle = entry.filename.endswith("data.pkl")
            target.writestr(entry.filename, pickled if pickled and is_pickle else source.read(entry))
        more(target)
    return path


def change_end(path: Path, field: int, value: int) -> None:
    """Set a field of the end record: 1 to 4 disks and entries, 5 the directory's size, 6 its place."""
    data = bytearray(path.read_bytes())
    fields = list(END.unpack(data[-22:]))
    fields[field] = value
    data[-22:] = END.pack(*fields)
    path.write_bytes(data)


def change_end64(path: Path, offset: int, value: int) -> None:
    """Set eight bytes of the zip64 record of a file that torch.save wrote."""
    torch.save(tiny_tensors("x070"), path)
    data = bytearray(path.read_bytes())
    at = len(data) + END64_AT + offset
    data[at : at + 8] = value.to_bytes(8, "little")
    path.write_bytes(data)


def change_directory(path: Path, offset: int, data: bytes, entry: str = "data/0") -> None:
    """Overwrite bytes of an entry's record in the zip directory: 20 and 24 sizes, 42 place of the header."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2", 0, content.rindex(entry.encode()))
    content[at + offset : at + offset + len(data)] = data
    path.write_bytes(content)


class Program:
    """A pickle, operation by operation."""

    def __init__(self) -> None:
        self.data = bytearray(b"\x80\x02")

    def add(self, *parts: bytes) -> Program:
        """Append operations as they are."""
        self.data += b"".join(parts)
        return self

    def end(self) -> bytes:
        """The pickle."""
        return bytes(self.data) + b"."


def text(value: str) -> bytes:
    """The operation that pushes a text."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


ORDERED = b"ccollections\nOrderedDict\n"


def memory_bombs() -> dict[str, bytes]:
    """Pickles of a few kB that take gigabytes, or for ever, in a reader that allows what torch allows."""
    pairs = b"".join(b"(" + text(str(i)) + b"Nt" for i in range(2000))
    hashes = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    return {
        "bytes of any size": Program()
        .add(b"c__builtin__\nbytearray\n", b"\x8a\x06", (1 << 40).to_bytes(6, "little"), b"\x85R")
        .end(),
        "storage of any size": Program()
        .add(b"ctorch\nFloatStorage\n", b"\x8a\x06", (1 << 40).to_bytes(6, "little"), b"\x85R")
        .end(),
        "copies of a list": Program()
        .add(ORDERED, b"q\x00]q\x01(", pairs, b"e(", b"h\x00h\x01\x85R" * 2000, b"t")
        .end(),
        "copies in call": Program().add(b"(" + pairs + b"t", (ORDERED + b"(](" + pairs + b"etR") * 3).end(),
        "key that takes for ever": Program().add(b")q\x00", hashes, b"}", b"h\x3c", b"Ns").end(),
        "memo beyond memory": Program().add(b"}r\xff\xff\xff\xff", b"j\xff\xff\xff\xff").end(),
        "text beyond the file": Program().add(b"X\xff\xff\xff\xff").end(),
        "lists": Program().add(b"]" * 400_000).end(),
        "nothing": b"",
        "stack below zero": Program().add(b"R").end(),
        "mark without end": Program().add(b"(((t").end(),
    }


def write_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    """A .safetensors file with any header: an object, or bytes as they are."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def legacy_claim(path: Path, count: int) -> Path:
    """A file of the format before 2020 whose only storage claims `count` values that are not there."""
    buffer = io.BytesIO()
    torch.save(OrderedDict(a=torch.zeros(77)), buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    old, new = pickle.dumps(77, 2)[2:-1], pickle.dumps(count, 2)[2:-1]
    at = data.index(b"cpu") + 3
    path.write_bytes(data[:at] + data[at:].replace(old, new, 1))
    return path


REMEDIES = ("copy", "use a", "rename", "name a", "check the path", "remove", "save the state_dict")


def refusal(path: Path) -> str:
    """The one line with which `path` is refused as a model; it names the file and a remedy."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 1500
    assert any(remedy in message for remedy in REMEDIES), message
    return message
