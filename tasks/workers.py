"""Worker processes of tasks: one pool for all flows of this process; a worker of its own where a runner put a task."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rwkvq.run import Run
from rwkvq.workers import WorkerPool

_pools: list[WorkerPool] = []
_own = threading.local()
_lock = threading.Lock()
_sharing = 0


@contextmanager
def sharing() -> Iterator[None]:
    """Count one more flow of this process that works at the same time as others."""
    global _sharing
    with _lock:
        _sharing += 1
    try:
        yield
    finally:
        with _lock:
            _sharing -= 1


def share_of(workers: int) -> int:
    """Threads for a stage that is one job: the workers divided by the flows that work now, at least 1."""
    with _lock:
        return -(-workers // max(1, _sharing))


@contextmanager
def flow_pool(run: Run) -> Iterator[WorkerPool]:
    """The pool of this process: the one that a flow further out has opened, or a new one until the block ends."""
    if _pools:
        yield _pools[-1]
        return
    with run.new_pool() as pool:
        _pools.append(pool)
        try:
            yield pool
        finally:
            _pools.remove(pool)


def own_pool(threads: int) -> WorkerPool:
    """A pool of one worker for the thread that runs this task, kept for its next one."""
    if getattr(_own, "pool", None) is None or _own.threads != threads:
        _own.pool, _own.threads = WorkerPool(1, threads), threads
    pool: WorkerPool = _own.pool
    return pool
