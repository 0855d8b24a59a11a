"""Opening .safetensors files: the header's size is checked before anything reads the header."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rwkvq.documents import open_regular

MAX_HEADER_BYTES = 4 << 20
"""A header takes about a hundred bytes a tensor, that of the largest artifact about 1 MB."""


def open_safetensors(path: Path) -> Any:
    """A handle of the safetensors library, a context manager, tensors mapped and not read.

    The library checks the header: offsets against the file's size, shape times dtype against the offsets, no gaps.
    Raises OSError, or ValueError with a reason of one line.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
    if not 0 < length <= size - 8:
        raise ValueError("header reaches beyond the end of the file")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OverflowError) as error:
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0][:160]) from error
