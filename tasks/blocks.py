"""The Prefect task of one block: the unit of parallel work in stage `quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from rwkvq.quantize.block import BlockJob
from rwkvq.quantize.block import run as run_block
from rwkvq.run import Run
from rwkvq.settings import parse
from rwkvq.stages import run_job_in_pool
from rwkvq.workers import WorkerPool
from tasks.retries import is_transient


@task(
    name="quantize-block",
    task_run_name="quantize-{label}",
    cache_policy=NO_CACHE,
    retries=1,
    retry_delay_seconds=1,
    retry_condition_fn=is_transient,
)
def quantize_block_task(label: str, job: BlockJob, settings: Mapping[str, Any], pool: WorkerPool | None) -> int:
    """Quantize one block and return how many tensors were computed (not kept from an earlier run).

    With a pool the work runs in one of its processes, which can be stopped at the time limit; without one this process
    is a worker already (runners `processes` and `dask`).
    """
    log = get_run_logger()
    run = Run(parse(settings, "the flow's settings"))

    def show(event: Mapping[str, Any]) -> None:
        if event["done"] == event["total"]:
            log.info("%s: all %d tensors done", label, event["total"])

    if pool is not None:
        computed = run_job_in_pool(pool, run, job, show)
    else:
        import torch

        torch.set_num_threads(run.settings.run.threads)
        computed = run_block(asdict(job), show)
    return len(computed)
