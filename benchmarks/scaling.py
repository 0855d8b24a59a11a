"""What more workers bring: measured here, and simulated for 8 and 64 workers from the measured times of every task.

    python -m benchmarks.scaling                                    # 1 and 2 workers, on data/demo/rwkv7-9m.pth
    python -m benchmarks.scaling --workers 1 --workers 2 --workers 4 --workers 8 --workers 16 --pairs 3
    python -m benchmarks.scaling --from-json                        # the page again from scaling.json

Runs with different numbers of workers take turns, so that a busy machine slows all of them; each has one torch thread.
Stage `quantize` runs on worker processes that are up; the whole line is the flow's command with imports and server.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.scaling_page import page
from rwkvq.documents import read_yaml
from rwkvq.files import canonical_json, sha256_of_bytes, sha256_of_file, write_json, write_text
from rwkvq.quantize.block import BlockJob
from rwkvq.run import Run
from rwkvq.settings import apply_overrides, parse
from rwkvq.stages import block_jobs, run_stage
from rwkvq.workers import WorkerPool

POLICIES = ("rtn", "sq", "rwkvquant")
POLICY = "plan.policy=rwkvquant"
"""Of the measured line: every task of it is one that the simulator knows."""
BEFORE = ("windows", "activations", "proxies", "plan")


def hash_of(folder: Path, pattern: str) -> str:
    """One hash for all files below `folder` that match, by name and content."""
    files = {str(path.relative_to(folder)): sha256_of_file(path) for path in folder.rglob(pattern) if path.is_file()}
    return sha256_of_bytes(canonical_json(files).encode())


def time_blocks(run: Run, workers: int) -> dict[str, Any]:
    """Run every block job on `workers` idle worker processes: wall seconds, seconds of each job, hash of the bytes."""
    shutil.rmtree(run.quantized, ignore_errors=True)
    jobs = block_jobs(run)

    def timed(job: BlockJob) -> float:
        begin = time.monotonic()
        pool.run("rwkvq.quantize.block:run", asdict(job), timeout=1e6, retries=0, on_event=lambda event: None)
        return time.monotonic() - begin

    with WorkerPool(workers, 1) as pool, ThreadPoolExecutor(workers) as threads:
        # a worker answers when it has imported everything; so all of them have before the clock starts
        empty = {**asdict(jobs[0]), "block": 1 << 30}
        warm = [
            threads.submit(
                pool.run, "rwkvq.quantize.block:run", empty, timeout=1e6, retries=0, on_event=lambda event: None
            )
            for _ in range(workers)
        ]
        for future in warm:
            future.result()
        begin = time.monotonic()
        seconds = list(threads.map(timed, jobs))
        wall = time.monotonic() - begin
    return {"workers": workers, "wall": wall, "jobs": seconds, "hash": hash_of(run.quantized, "*.safetensors")}


def time_flow(params: Path, folder: Path, workers: int) -> dict[str, Any]:
    """Run the whole line as a flow in a new process: wall seconds, seconds of each stage, hash of the artifact."""
    shutil.rmtree(folder, ignore_errors=True)
    overrides = f"run_dir={folder}", f"run.workers={workers}", "run.threads=1", "run.runner=threads", POLICY
    sets = [part for override in overrides for part in ("--set", override)]
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "flows.quantize_model", "--params", params, *sets], check=True)
    wall = time.monotonic() - begin
    stages = json.loads((folder / "timings.json").read_text(encoding="utf-8"))
    return {"workers": workers, "wall": wall, "stages": stages, "hash": hash_of(folder / "artifact", "*")}


def time_scheduling(few: int = 10, many: int = 110) -> float:
    """Seconds that Prefect takes for a task that does nothing, on the runner `threads` with one worker."""
    script = f"""
import time
from flows.server import connect
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner
nothing = task(cache_policy=NO_CACHE)(lambda index: None)
@flow(task_runner=ThreadPoolTaskRunner(max_workers=1))
def empty(count: int) -> float:
    begin = time.monotonic()
    for future in nothing.map(list(range(count))):
        future.result()
    return time.monotonic() - begin
connect()
empty({few})
print("seconds", empty({few}), empty({many}))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    _, short, long = next(line for line in done.stdout.splitlines() if line.startswith("seconds")).split()
    return (float(long) - float(short)) / (many - few)


def measure(params: Path, folder: Path, workers: Sequence[int], pairs: int) -> dict[str, Any]:
    """All measurements, as plain values."""
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "quantize": [], "line": [], "policies": {}}
    settings = parse(
        apply_overrides(read_yaml(params), [f"run_dir={folder / 'run'}", "run.workers=1", POLICY]), str(params)
    )
    run = Run(settings)
    for stage in BEFORE:
        run_stage(run, stage)
    spec = run.checkpoint.spec
    found["model"] = {"name": run.model_path.stem, "layers": spec.layers, "width": spec.width, "vocab": spec.vocab}
    found["windows"] = settings.windows.samples + settings.windows.held_out
    for _ in range(pairs):
        for count in workers:
            found["quantize"].append(said("quantize", time_blocks(run, count)))
        for count in workers:
            found["line"].append(said("line", time_flow(params, folder / "flow", count)))
    for policy in POLICIES:
        values = apply_overrides(read_yaml(params), [f"run_dir={folder / 'run'}", f"plan.policy={policy}"])
        other = Run(parse(values, str(params)))
        run_stage(other, "plan")
        found["policies"][policy] = said(policy, time_blocks(other, 1))["jobs"]
    found["dispatch"] = said("dispatch", time_scheduling())
    return found


def said(what: str, value: Any) -> Any:
    """`value`, after a line on the error stream."""
    print(what, value, file=sys.stderr, flush=True)
    return value


def main(
    params: Annotated[Path, typer.Option(help="Settings of the model that is measured.")] = Path("params.yaml"),
    workers: Annotated[list[int], typer.Option(help="Numbers of workers (repeatable), 1 among them.")] = [1, 2],  # noqa: B006
    pairs: Annotated[int, typer.Option(help="Rounds through all numbers of workers.")] = 2,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/scaling.md"),
    from_json: Annotated[bool, typer.Option(help="Measure nothing; make the page of the JSON beside it.")] = False,
) -> None:
    """Measure, write the JSON, write the page."""
    raw = out.with_suffix(".json")
    if not from_json:
        with tempfile.TemporaryDirectory() as name:
            write_json(raw, measure(params, Path(name), sorted(workers), pairs))
    write_text(out, page(json.loads(raw.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    typer.run(main)
