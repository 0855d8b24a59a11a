"""A whole stage as a job of a worker process: it can be stopped at its time limit, and killed without the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from rwkvq.files import Progress
from rwkvq.run import Run
from rwkvq.settings import Settings, parse
from rwkvq.stages.line import run_stage
from rwkvq.stages.stage import StageResult
from rwkvq.workers import WorkerPool

FUNCTION = "rwkvq.stages.job:run"


def run(job: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run stage job["stage"] of the settings job["settings"] in this process; return its StageResult as plain values.

    Sends {"what", "done", "total"} as the stage goes on. Raises what rwkvq.stages.run_stage raises.
    """

    def show(what: str, done: int, total: int) -> None:
        on_event({"what": what, "done": done, "total": total})

    return asdict(run_stage(Run(parse(job["settings"], "the settings of this job")), job["stage"], show))


def run_stage_in_pool(pool: WorkerPool, settings: Settings, name: str, progress: Progress, label: str) -> StageResult:
    """Run one stage on a worker process of `pool`, with the time limit of settings.run; `label` names it in messages.

    Not for stage `quantize`, whose block jobs are the pool's own jobs. Trying again is the caller's affair.
    """
    assert name != "quantize"
    answer = pool.run(
        FUNCTION,
        {"settings": settings.model_dump(mode="json"), "stage": name},
        timeout=settings.run.task_timeout,
        retries=0,
        on_event=lambda event: progress(event["what"], event["done"], event["total"]),
        label=label,
        alone=True,  # a stage sets the threads of torch
    )
    return StageResult(**answer)
