"""Turns: which of many waiting threads may work next, the one of least rank first, and how many at once."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rwkvq.errors import RwkvqError


class Turns:
    """At most `at_once` holders; those that wait get their turn by rank."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: list[int] = []
        self._changed = threading.Condition()
        self._closed = False

    @contextmanager
    def turn(self, rank: int) -> Iterator[None]:
        """Wait for a turn and hold it. Ranks are distinct. Raises RwkvqError if the turns were closed meanwhile."""
        with self._changed:
            heapq.heappush(self._waiting, rank)
            self._changed.wait_for(lambda: self._closed or (self._free > 0 and self._waiting[0] == rank))
            self._waiting.remove(rank)
            heapq.heapify(self._waiting)
            if self._closed:
                raise RwkvqError("stopped together with the run, before this began")
            self._free -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """How many wait for a turn."""
        with self._changed:
            return len(self._waiting)

    def close(self) -> None:
        """Nobody gets a turn any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
