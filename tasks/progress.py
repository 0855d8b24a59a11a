"""Progress of a running task: a log line and a bar in the Prefect UI, at most one every few seconds."""

from __future__ import annotations

import time
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import update_progress_artifact

from rwkvq.files import Progress
from tasks.events import is_heard

SECONDS = 3.0
"""Between two lines; what takes less time needs no progress."""


def progress_of(name: str, bar: UUID | None = None) -> Progress:
    """A Progress that logs as `name` and moves `bar`, both in the task run that calls this."""
    log = get_run_logger()
    last = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last < SECONDS:
            return
        last = now
        if not is_heard():
            log.info("%s: %d of %d (%s)", name, done, total, what)
        if bar is not None:
            update_progress_artifact(artifact_id=bar, progress=100.0 * done / total)

    return show
