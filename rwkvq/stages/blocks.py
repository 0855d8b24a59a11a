"""Stage `quantize`: one job a block, on worker processes; every tensor is a file of its own until it is packed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from rwkvq.checkpoint.headers import open_safetensors
from rwkvq.errors import QuantizationError
from rwkvq.files import Progress, remove_leftovers
from rwkvq.plan.candidates import CurvePoint, write_curves
from rwkvq.plan.plan import Plan, PlannedTensor
from rwkvq.quantize import block, curves, outer_curves
from rwkvq.quantize.results import tensor_path
from rwkvq.quantize.trellis import TrellisOptions
from rwkvq.run import Run
from rwkvq.settings import RunSettings
from rwkvq.stages.healing import damaged_outputs, healed
from rwkvq.threads import map_in_order
from rwkvq.workers import WorkerPool

log = logging.getLogger("rwkvq.stages")


def read_plan(run: Run) -> Plan:
    """The run's plan, checked against the model. Raises PlanError."""
    return checked_plan(run, run.plan)


def checked_plan(run: Run, path: Path) -> Plan:
    """The plan in `path`, checked against the run's model. Raises PlanError."""
    plan = Plan.read(path)
    plan.check_model(run.checkpoint)
    return plan


def block_jobs(run: Run) -> list[block.BlockJob]:
    """The jobs of stage `quantize`: one a block that has something to quantize."""
    return _jobs_of(run, read_plan(run))


def _jobs_of(run: Run, plan: Plan) -> list[block.BlockJob]:
    present = {entry.block for entry in plan.tensors if entry.method != "keep"}
    ordered = sorted(present, key=lambda index: -1 if index is None else index)  # embedding and head take longest
    places = str(run.model_path), str(run.plan), str(run.activations), str(run.quantized)
    return [block.BlockJob(*places, index, str(run.gradients), run.settings.run.device) for index in ordered]


def measure_curves(run: Run, progress: Progress) -> None:
    """Stage `curves`: one job a block, and one for embedding and head, on the run's pool or on one of its own.

    The table is written at the end.
    """
    settings, limits = run.settings.curves, run.settings.run
    spec = run.checkpoint.spec
    places = str(run.model_path), str(run.activations), str(run.gradients), str(run.curves.parent)
    numbers = settings.sample, settings.state_bits, settings.guide, TrellisOptions().damping
    outer = outer_curves.OuterCurveJob(
        str(run.model_path), str(run.gradients), settings.sample, TrellisOptions().damping
    )
    # first what takes longest
    jobs: list[tuple[str, str, dict[str, Any]]] = [
        ("embedding and head", "rwkvq.quantize.outer_curves:run", asdict(outer))
    ]
    for index in range(spec.layers):
        job = curves.CurveJob(*places, index, *numbers, settings.output_feedback, limits.device)
        jobs.append((f"block {index}", "rwkvq.quantize.curves:run", asdict(job)))

    def work(pool: WorkerPool, job: tuple[str, str, dict[str, Any]]) -> list[dict[str, Any]]:
        name, function, values = job
        run_job = partial(
            pool.run,
            function,
            values,
            timeout=limits.task_timeout,
            retries=limits.retries,
            on_event=lambda event: None,
            label=f"curves of {name}",
        )
        points: list[dict[str, Any]] = healed(run, run_job)
        return points

    found: list[list[CurvePoint]] = []
    with nullcontext(run.pool) if run.pool else run.new_pool(len(jobs)) as pool:
        for done, points in enumerate(map_in_order(partial(work, pool), jobs, run.workers, ahead=len(jobs)), 1):
            found.append([CurvePoint(**point) for point in points])
            progress(f"curves of {jobs[done - 1][0]}", done, len(jobs))
    write_curves(run.curves, [*chain.from_iterable(found[1:]), *found[0]], {"model_sha256": run.checkpoint.identity()})


def run_job_in_pool(
    pool: WorkerPool, job: block.BlockJob, limits: RunSettings, on_event: Callable[[dict[str, Any]], None]
) -> list[str]:
    """Run one block job on a worker process of `pool`, with the time limit and retries of `limits`; see block.run."""
    computed: list[str] = pool.run(
        "rwkvq.quantize.block:run",
        asdict(job),
        timeout=limits.task_timeout,
        retries=limits.retries,
        on_event=on_event,
        label=job.folder.name,
    )
    return computed


def quantize(run: Run, progress: Progress) -> None:
    """Quantize every block on the run's pool, or on one of its own."""
    jobs = block_jobs(run)
    if run.pool is not None:
        quantize_in_pool(run, run.pool, jobs, progress)
        return
    with run.new_pool(len(jobs)) as pool:
        quantize_in_pool(run, pool, jobs, progress)


def quantize_in_pool(run: Run, pool: WorkerPool, jobs: list[block.BlockJob], progress: Progress) -> None:
    """Run all block jobs on `pool`. The first error stops the rest; finished tensors stay.

    A job that finds the activation cache damaged is run once more after the cache was healed.
    """
    total = len(quantized_files(run))
    done: set[str] = set()  # a job that is tried again reports the tensors it keeps once more

    def count(event: Mapping[str, Any]) -> None:
        done.add(str(event["tensor"]))
        progress(str(event["tensor"]), len(done), total)

    def work(job: block.BlockJob) -> list[str]:
        return healed(run, lambda: run_job_in_pool(pool, job, run.settings.run, count))

    with ThreadPoolExecutor(max_workers=run.workers) as threads:
        futures = [threads.submit(work, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            pool.close()
            raise
    finish_quantized(run)


def finish_quantized(run: Run) -> None:
    """Check that every planned tensor is there; delete files of other plans and what killed workers left.

    Raises QuantizationError.
    """
    expected = {path for path, _ in quantized_files(run)}
    missing = sorted(path for path in expected if not path.is_file())
    if missing:
        raise QuantizationError(f"{missing[0]}: not written ({len(missing)} tensors missing); run stage quantize again")
    for stray in set(run.quantized.rglob("*.safetensors")) - expected:
        stray.unlink()
    remove_leftovers(run.quantized)


def heal_quantized(run: Run) -> list[Path]:
    """Quantize damaged tensors of the finished stage again, in this process; return their files.

    Raises QuantizationError if they come out otherwise than before, and what a block job raises.
    """
    damaged = damaged_outputs(run, "quantize")
    for path in damaged:
        log.warning("%s: damaged, no longer what stage quantize wrote; quantizing it again", path)
        path.unlink(missing_ok=True)  # also what only its hash tells
    if damaged:
        folders = {path.parent.name for path in damaged}
        for job in block_jobs(run):
            if job.folder.name in folders:
                healed(run, partial(block.run, asdict(job), lambda event: None))
        if left := damaged_outputs(run, "quantize"):
            raise QuantizationError(f"{left[0]}: quantized again with other bytes; run stage quantize again")
    return damaged


def quantized_files(run: Run) -> list[tuple[Path, PlannedTensor]]:
    """File and plan row of every quantized tensor."""
    plan = read_plan(run)
    return [
        (tensor_path(job.folder, entry.name), entry)
        for job in _jobs_of(run, plan)
        for entry in block.planned_for(plan, job.block)
    ]


def quantized_parts(run: Run) -> Callable[[PlannedTensor], dict[str, Tensor]]:
    """What reads the packed parts of a quantized tensor of the run's plan. It raises QuantizationError."""
    files = {entry.name: path for path, entry in quantized_files(run)}

    def parts(entry: PlannedTensor) -> dict[str, Tensor]:
        with quantized_file(files[entry.name]) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

    return parts


def tensor_errors(run: Run) -> dict[str, dict[str, float | None]]:
    """What quantization did to each weight, by name (results.TensorError as plain values)."""
    errors = {}
    for path, entry in quantized_files(run):
        with quantized_file(path) as file:
            errors[entry.name] = json.loads(file.metadata()["error"])
    return errors


@contextmanager
def quantized_file(path: Path) -> Iterator[Any]:
    """Open one quantized tensor's file. Raises QuantizationError if it cannot be read."""
    try:
        with open_safetensors(path) as file:
            yield file
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise QuantizationError(
            f"{path}: missing or damaged; run stage quantize again, it rebuilds this file"
        ) from error
