"""Whether decoded models stay in memory for an evaluation, or run block by block."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import psutil

from rwkvq.checkpoint.reader import WeightSource
from rwkvq.engine.model import EMBEDDING, Engine

log = logging.getLogger(__name__)

_CGROUP = Path("/sys/fs/cgroup")


def engines_for(sources: Mapping[str, WeightSource], memory_gb: float | None = None) -> dict[str, Engine]:
    """An engine for each model; all keep their decoded weights if these fit `memory_gb` together, else none does.

    memory_gb: None = half of the memory that is free. The choice changes no figure, only time and memory.
    """
    needed = sum(decoded_bytes(source) for source in sources.values())
    allowed = free_bytes() / 2 if memory_gb is None else memory_gb * 1e9
    resident = needed <= allowed
    if not resident:
        log.info("models run block by block: decoded they take %.1f GB of %.1f allowed", needed / 1e9, allowed / 1e9)
    return {name: Engine(source, resident=resident) for name, source in sources.items()}


def decoded_bytes(source: WeightSource) -> int:
    """Bytes that a resident engine of the model keeps: float32 weights, and the embedding as it is stored."""
    total = 0
    for name in source.names():
        size = source.dtype(name).itemsize if name == EMBEDDING else 4
        total += size * math.prod(source.shape(name))
    return total


def free_bytes() -> int:
    """Memory that may still be used, in bytes: what the system can give, or what is left of a container's limit."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="utf-8"))
        used = int((_CGROUP / "memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no container, or no limit ("max")
        return free
    return max(0, min(free, limit - used))
