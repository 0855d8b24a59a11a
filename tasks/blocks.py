"""The Prefect task of one block: the unit of parallel work in stage `quantize`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from rwkvq.quantize.block import BlockJob
from rwkvq.settings import RunSettings
from rwkvq.stages.blocks import run_job_in_pool
from rwkvq.workers import JobTimeout, WorkerDied, WorkerPool
from tasks.progress import progress_of
from tasks.retries import is_transient

_own = threading.local()


@task(
    name="quantize-block",
    task_run_name="quantize-{label}",
    cache_policy=NO_CACHE,
    retry_delay_seconds=1,
    retry_condition_fn=is_transient,
)
def quantize_block_task(label: str, job: BlockJob, limits: RunSettings, pool: WorkerPool | None) -> int:
    """Quantize one block in a worker process and return how many tensors were computed (not kept from an earlier run).

    `pool` None: this task does not run in the flow's process, and uses a worker of its own. Raises what the job raises,
    JobTimeout, or WorkerDied; the latter is tried again.
    """
    progress = progress_of(f"quantize {label}")

    def show(event: Mapping[str, Any]) -> None:
        progress(event["tensor"], event["done"], event["total"])

    try:
        once = limits.model_copy(update={"retries": 0})  # Prefect tries again
        computed = run_job_in_pool(pool or _own_worker(limits.threads), job, once, show)
    except (JobTimeout, WorkerDied) as error:
        raise type(error)(f"{label}: {error}") from error
    get_run_logger().info("quantize %s: done, %d tensors", label, len(computed))
    return len(computed)


def _own_worker(threads: int) -> WorkerPool:
    """The worker process of the thread that runs this task, kept for its next one."""
    if getattr(_own, "pool", None) is None or _own.threads != threads:
        _own.pool, _own.threads = WorkerPool(1, threads), threads
    pool: WorkerPool = _own.pool
    return pool
