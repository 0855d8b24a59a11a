"""Stage `quantize` alone as a flow: `python -m tests.block_flow PARAMS.yaml`, after the stages before it have run."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

from prefect import flow

from flows.blocks import map_blocks
from flows.runners import task_runner
from flows.server import connect
from rwkvq.run import Run
from rwkvq.settings import Settings, load
from rwkvq.stages import block_jobs
from tasks.workers import flow_pool


@flow(name="blocks")
def blocks(settings: Settings) -> None:
    """Quantize every block; the number of finished ones goes to the output stream, a line each."""
    run = Run(settings)
    is_threads = settings.run.runner == "threads"
    with flow_pool(run) if is_threads else nullcontext() as pool:
        damaged = map_blocks(run, "cell", pool, block_jobs(run), lambda done: print(done, flush=True))
    assert damaged == []


if __name__ == "__main__":
    chosen = load(Path(sys.argv[1]), sys.argv[2:])
    connect()
    blocks.with_options(task_runner=task_runner(Run(chosen)))(chosen)
