"""How large a weight file will be, from the layouts of its weights: never less than it is, and hardly more."""

from __future__ import annotations

import json
import re

from rwkvq.errors import SettingsError
from rwkvq.formats import Layout

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|KiB|MiB|GiB)")
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_FILE_BYTES = 128
"""Of one weight file, beside the entries of its header and its data: metadata, the header's length, filling."""
_SHARD_BYTES = 2_000_000_000
"""Of a sharded model, what a weight file holds at least on average: half of the largest shard."""


def size_in_bytes(text: str) -> int:
    """Bytes of `1.2GB`, `800 MB`, `1.5GiB`. Raises SettingsError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SettingsError("plan.size", [f"{text!r} is no size; expected a number and one of {', '.join(_UNITS)}"])
    return int(float(match[1]) * _UNITS[match[2]])


def files_bits(size: int) -> int:
    """Bits of a model of `size` bytes that belong to no weight, at most."""
    return 8 * _FILE_BYTES * (1 + size // _SHARD_BYTES)


def file_bits(name: str, layout: Layout, largest: int) -> int:
    """Bits of one weight in a file of less than `largest` bytes: what is stored, and its entries in the header."""
    return layout.stored_bits() + 8 * sum(
        len(_entry(f"{name}::{part}", shape, largest)) for part, (_, shape) in layout.parts().items()
    )


def _entry(key: str, shape: tuple[int, ...], largest: int) -> bytes:
    """An entry of the longest name of a dtype and the longest offsets, with the comma behind it."""
    entry = {key: {"dtype": "BF16", "shape": list(shape), "data_offsets": [largest, largest]}}
    return json.dumps(entry, separators=(",", ":"), ensure_ascii=False).encode()[1:-1] + b","
