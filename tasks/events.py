"""Events of running cells: tasks and flows tell them, a display listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rwkvq.family.events import CellEvent

_listeners: list[Callable[[CellEvent], None]] = []


@contextmanager
def listening(listener: Callable[[CellEvent], None]) -> Iterator[None]:
    """Hand every event of this process to `listener` until the block ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(event: CellEvent) -> None:
    """Hand `event` to whoever listens in this process; in a process of a task runner nobody does."""
    for listener in list(_listeners):
        listener(event)


def is_heard() -> bool:
    """Whether somebody listens in this process: then the log need not repeat every step."""
    return bool(_listeners)
