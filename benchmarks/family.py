"""What the family flow costs and gains: one and two workers, a run with nothing to do, the work without Prefect.

    python -m benchmarks.family families/demo.yaml
    python -m benchmarks.family families/demo.yaml --set evaluate.windows=8   # shorter

Every run is a new process with a new Prefect data base and an empty results folder; one torch thread a worker.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.quality import markdown_table
from rwkvq.family.family import Family, load_family
from rwkvq.files import canonical_json, sha256_of_bytes, sha256_of_file, write_text
from rwkvq.run import SHARED, Run
from rwkvq.stages import run_stage, stages_of
from rwkvq.workers import WorkerPool

PLAIN = "without Prefect, 2 workers"


def checksum(family: Family) -> str:
    """One hash for all artifacts of a family, by cell."""
    hashes = {cell.name: sha256_of_file(cell.run.artifact / "SHA256SUMS") for cell in family.cells}
    return sha256_of_bytes(canonical_json(hashes).encode())


def run_in_process(family: Family) -> None:
    """The same stages one after the other on the same number of workers, without tasks, server and display."""
    run = family.cells[0].run
    with WorkerPool(run.workers, run.settings.run.threads) as pool:
        for cell in family.cells:
            pooled = Run(cell.settings, pool)
            for name in (*SHARED, *(stage for stage in stages_of(pooled) if stage not in SHARED)):
                run_stage(pooled, name)


def timed(command: list[str], home: Path) -> float:
    """Wall seconds of a command in a process of its own."""
    environment = dict(os.environ, PREFECT_HOME=str(home), OMP_NUM_THREADS="1")
    begin = time.monotonic()
    subprocess.run(command, check=True, env=environment)
    return time.monotonic() - begin


def main(
    file: Annotated[Path, typer.Argument(help="Family file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value (repeatable).")] = None,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/family.md"),
    in_process: Annotated[bool, typer.Option("--in-process", hidden=True, help="Only run, without Prefect.")] = False,
) -> None:
    """Measure, check that all runs gave the same bytes, write the page."""
    overrides = overrides or []
    if in_process:
        run_in_process(load_family(file, overrides))
        return
    rows, sums = [], set()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for label, workers in (
            ("flow, 2 workers", 2),
            ("flow, 2 workers, again", 2),
            (PLAIN, 2),
            ("flow, 1 worker", 1),
        ):
            family = load_family(file, [*overrides, f"run.workers={workers}", "run.threads=1"])
            if not label.endswith("again"):
                shutil.rmtree(family.out, ignore_errors=True)
            program = ["benchmarks.family", "--in-process"] if label == PLAIN else ["flows.quantize_family"]
            sets = [part for item in family.overrides for part in ("--set", item)]
            figures[label] = timed([sys.executable, "-m", *program, str(file), *sets], Path(name) / label)
            sums.add(checksum(family))
            rows.append([label, f"{figures[label]:.1f}"])
    assert len(sums) == 1, "the runs gave different bytes"
    flow, plain = figures["flow, 2 workers"], figures[PLAIN]
    said = " ".join(["python -m benchmarks.family", str(file), *(f"--set {item}" for item in overrides)])
    lines = [
        "# Family flow: workers and overhead",
        f"    {said}",
        markdown_table(["run", "seconds"], rows),
        f"Two workers are {figures['flow, 1 worker'] / flow:.2f} times as fast as one; "
        f"all artifacts are equal (`{sums.pop()[:16]}`). The flow takes {flow - plain:+.1f} s against the same stages "
        f"without Prefect, one cell after the other ({100 * (flow / plain - 1):+.0f} %).",
    ]
    write_text(out, "\n\n".join(lines) + "\n")
    typer.echo(lines[-1])


if __name__ == "__main__":
    typer.run(main)
