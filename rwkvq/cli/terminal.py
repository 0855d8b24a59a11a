"""Lines on stderr beside a live display.

A display that repaints itself is spoilt by everything that others write to the same terminal: log handlers, worker
processes, C libraries. So while it is up, file descriptor 2 of this process, which its children inherit, is a pipe;
what comes out of it is printed above the display, line by line.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable
from typing import TextIO

_STDERR = 2
_PATIENCE_SECONDS = 5.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_controls(text: str) -> str:
    """`text` with control characters other than tab and newline written out (`\\x1b`), harmless to a terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class StderrLines:
    """From `begin` to `end` every line written to file descriptor 2 goes to a function; `terminal` is what lies behind.

    Children that began in between and outlive `end` may go on writing; their lines are still handed over.
    """

    def __init__(self) -> None:
        sys.stderr.flush()
        self._saved = os.dup(_STDERR)
        self.terminal: TextIO = os.fdopen(os.dup(self._saved), "w", encoding="utf-8", errors="backslashreplace")
        self._marker = f"end of {id(self)}"
        self._drained = threading.Event()

    def begin(self, show: Callable[[str], None]) -> None:
        """Hand lines to `show`, in a thread of its own, from now on."""
        read, write = os.pipe()
        os.dup2(write, _STDERR)  # inheritable, unlike the ends of the pipe
        os.close(write)
        threading.Thread(target=self._forward, args=(read, show), name="stderr-lines", daemon=True).start()

    def _forward(self, read: int, show: Callable[[str], None]) -> None:
        with os.fdopen(read, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                before, marker, _ = line.rstrip("\n").partition(self._marker)
                if before or not marker:
                    show(before)
                if marker:
                    self._drained.set()

    def end(self) -> None:
        """Give the terminal back after the last line written so far has been handed over."""
        sys.stderr.flush()
        os.write(_STDERR, f"{self._marker}\n".encode())
        os.dup2(self._saved, _STDERR)
        os.close(self._saved)
        self._drained.wait(_PATIENCE_SECONDS)
