"""Reads files within a limit of memory: `python -m tests.read_within MEGABYTES READER PATH ...` -> one JSON line each.

The limit is what the process may map beyond what it has mapped once its libraries are loaded.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rwkvq.artifact.reader import open_artifact
from rwkvq.calibration.cache import CacheReader
from rwkvq.calibration.windows import read_windows
from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.documents import read_yaml
from rwkvq.errors import RwkvqError
from rwkvq.plan.plan import Plan
from rwkvq.proxies import table


def read_cache(path: Path) -> None:
    """Open a file of the activation cache and read the first window."""
    with CacheReader(path, "input of block 0") as reader:
        reader.read(0, 1)
        reader.check()


READERS: dict[str, Callable[[Path], object]] = {
    "model": open_checkpoint,
    "artifact": open_artifact,
    "plan": Plan.read,
    "yaml": read_yaml,
    "windows": read_windows,
    "proxies": table.read,
    "cache": read_cache,
}


def used() -> int:
    """Resident bytes of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(megabytes: int, *arguments: str) -> None:
    """Read the first path of each reader without limit, then all of them within it."""
    jobs = [(name, Path(path)) for name, path in zip(arguments[::2], arguments[1::2], strict=True)]
    for name, path in jobs:
        if path.name.startswith("sound"):
            READERS[name](path)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = mapped + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, path in jobs:
        before, start, error = used(), time.monotonic(), ""
        try:
            READERS[name](path)
        except RwkvqError as refusal:
            error = str(refusal)
        more = (used() - before) >> 20
        print(json.dumps({"path": str(path), "error": error, "mb": more, "s": round(time.monotonic() - start, 2)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
