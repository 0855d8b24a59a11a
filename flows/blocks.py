"""The block tasks of one run on the flow's task runner, with their files sent through a store where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prefect import get_run_logger
from prefect.futures import as_completed

from rwkvq import transfer
from rwkvq.errors import ActivationError, StoredObjectError, StoreError
from rwkvq.quantize.block import BlockJob
from rwkvq.run import Run
from rwkvq.store import Store
from rwkvq.workers import WorkerPool
from tasks.blocks import quantize_block_task


def map_blocks(
    run: Run, name: str, pool: WorkerPool | None, jobs: list[BlockJob], show: Callable[[int], None]
) -> list[BlockJob]:
    """Run block jobs as tasks of cell `name`; return those that found the activation cache damaged.

    show(n) is called when n jobs are done. With run.store, files go there before a task and results come from there
    after it; what is missing or damaged in the store is sent again, unless no job gets done by that. Raises any other
    error.
    """
    log, url = get_run_logger(), run.settings.run.store
    store = Store(url) if url else None
    damaged: list[BlockJob] = []
    todo, done, in_vain = jobs, 0, 0
    while todo:
        before, lost = done, []
        for job, problem in _round(run, name, pool, todo, store):
            if isinstance(problem, ActivationError):
                damaged.append(job)
            elif problem is not None:
                log.warning("%s: %s: %s", name, label_of(job), problem)
                lost.append(job)
            else:
                done += 1
                show(done)
        in_vain = 0 if done > before else in_vain + 1
        if lost and in_vain > max(1, run.settings.run.retries):
            raise StoreError(f"{label_of(lost[0])}: run.store loses its files again and again; does anybody clean it?")
        todo = lost
    if store and not damaged:
        _clean(store, jobs)
    return damaged


def _clean(store: Store, jobs: list[BlockJob]) -> None:
    try:
        transfer.clean(store, jobs)
    except StoreError as error:  # the work is done, and a refusal to remove loses none of it
        get_run_logger().warning("files of this run are left in the store: %s", error)


def label_of(job: BlockJob) -> str:
    """Name of a block job for people."""
    return "outer" if job.block is None else f"block-{job.block:03d}"


def _round(
    run: Run, name: str, pool: WorkerPool | None, jobs: list[BlockJob], store: Store | None
) -> Iterator[tuple[BlockJob, ActivationError | StoredObjectError | None]]:
    """Run every job once; yield each with None when its tensors are in the run folder, or with why it goes on later."""
    limits = run.settings.run
    task = quantize_block_task.with_options(retries=limits.retries)
    running = {}
    for job in jobs:  # workers begin with the first while the files of the second are sent
        try:
            if store and not transfer.collect(store, job):
                yield job, None
                continue
            work = transfer.send(store, job) if store else job
        except ActivationError as problem:
            yield job, problem
        else:
            running[task.submit(label_of(job), work, limits, name, pool)] = job
    for future in as_completed(list(running)):
        job = running[future]
        try:
            future.result()
            missing = transfer.collect(store, job) if store else []
        except (ActivationError, StoredObjectError) as problem:
            yield job, problem
        else:
            yield job, StoredObjectError(f"not in the store: {', '.join(missing)}") if missing else None
