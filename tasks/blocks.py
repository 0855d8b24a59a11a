"""The Prefect task of one block: the unit of parallel work in stage `quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from rwkvq.family.events import CellEvent
from rwkvq.quantize.block import BlockJob
from rwkvq.settings import RunSettings
from rwkvq.transfer import RemoteJob
from rwkvq.workers import WorkerPool
from tasks.events import tell
from tasks.progress import progress_of
from tasks.retries import is_transient
from tasks.workers import own_pool


@task(
    name="quantize-block",
    task_run_name="quantize-{label}",
    cache_policy=NO_CACHE,
    retry_delay_seconds=1,
    retry_condition_fn=is_transient,
)
def quantize_block_task(
    label: str, job: BlockJob | RemoteJob, limits: RunSettings, cell: str, pool: WorkerPool | None
) -> int:
    """Quantize one block of `cell` in a worker process and return how many tensors were computed (not kept or found).

    A RemoteJob runs where the run folder is not seen (rwkvq/transfer.py). `pool` None: this task does not run in the
    flow's process, and uses a worker of its own. Raises what the job raises, JobTimeout, WorkerDied or OutOfMemory.
    """
    log_progress = progress_of(f"{cell}: quantize {label}")

    def show(event: Mapping[str, Any]) -> None:
        # `total` of a tensor's event is of the whole cell, which a block does not know
        tell(CellEvent(cell, "tensor", "quantize", event["tensor"], error=event.get("error")))
        log_progress(event["tensor"], event["done"], event["total"])

    computed: list[str] = (pool or own_pool(limits.threads)).run(
        "rwkvq.transfer:run" if isinstance(job, RemoteJob) else "rwkvq.quantize.block:run",
        asdict(job),
        timeout=limits.task_timeout,
        retries=0,  # Prefect tries again
        on_event=show,
        label=f"{cell}: {label}",
    )
    get_run_logger().info("%s: quantize %s: done, %d tensors", cell, label, len(computed))
    return len(computed)
