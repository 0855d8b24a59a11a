"""Waiting for other processes, and ports for servers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import psutil


def eventually(condition: Callable[[], object], seconds: float = 120) -> bool:
    """Whether the condition comes true within some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return True
        except psutil.Error:
            pass
        time.sleep(0.02)
    return False


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
