"""The experiments of docs/method.md 13 as one Prefect flow: `python -m flows.ablations ablations/demo.yaml`.

Every line that an experiment needs is a cell as in flows/quantize_family.py; then every experiment is measured, a task
for each model and seed; at the end the table, the figures and the page are made from the rows. What is finished is
kept: the same command goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows.command import run_command
from flows.quantize_family import one_line, run_cells
from flows.quantize_model import pool_of
from flows.runners import task_runner
from flows.server import connect, lost_server_named
from rwkvq.ablations.experiments import EXPERIMENTS
from rwkvq.ablations.page import publish
from rwkvq.ablations.study import Study, load_study, write_texts
from rwkvq.cli.display import console, table
from rwkvq.errors import FamilyError, RwkvqError
from rwkvq.family.results import CellResult
from rwkvq.files import run_lock
from rwkvq.workers import WorkerPool
from tasks.ablations import experiment_task


@flow(name="ablations", flow_run_name="{out}")
def ablations(study: Study, out: str, page: str | None = None) -> list[dict[str, Any]]:
    """Run the lines and the experiments of `study`; return the state of each line and experiment.

    out: names the run; page: Markdown file to write, with its table and figures beside it. Raises FamilyError after
    everything has ended if something failed, OutputError if another run works in the same folder.
    """
    write_texts(study)
    family = study.family()
    run = family.cells[0].run
    with run_lock(family.out), pool_of(run) as pool:
        assert pool is not None, "a study has runner threads"
        made = run_cells(family)
        lines = {cell.run.folder: result for cell, result in zip(family.cells, made, strict=True)}
        results = [*made, *measure(study, pool, lines)]
        text = publish(study, None if page is None else Path(page))
    create_table_artifact(key="ablations", table=[asdict(result) for result in results])
    create_markdown_artifact(key="ablations-page", markdown=text)
    if left := [result for result in results if result.state != "done"]:
        raise FamilyError(
            f"{study.out}: {len(left)} of {len(results)} lines and experiments are not done "
            f"({left[0].name}: {left[0].error}); mend the cause and run the same command again, it does only these"
        )
    return [asdict(result) for result in results]


def measure(study: Study, pool: WorkerPool, lines: dict[Path, CellResult]) -> list[CellResult]:
    """Measure every experiment whose lines are done, a task for each model and seed; one result each, in order."""
    log = get_run_logger()
    running: dict[tuple[str, str, int], PrefectFuture[Any] | str] = {}
    for experiment, model, seed in study.parts():
        needed = [study.run_of(model, seed, line).folder for line in EXPERIMENTS[experiment].lines]
        missing = [lines[folder] for folder in needed if lines[folder].state != "done"]
        label = f"{experiment} {model} seed {seed}"
        if missing:
            running[experiment, model, seed] = f"{missing[0].name}: {missing[0].error}"
            continue
        limits = study.run_of(model, seed, EXPERIMENTS[experiment].lines[0]).settings.run
        task = experiment_task.with_options(retries=limits.retries)
        running[experiment, model, seed] = task.submit(label, study, (experiment, model, seed), limits, pool)
    log.info("%d experiments to measure", len(running))
    return [result_of(*part, found) for part, found in running.items()]


def result_of(experiment: str, model: str, seed: int, found: PrefectFuture[Any] | str) -> CellResult:
    """Wait for one experiment and say how it ended; a text is why it was not run."""
    name = f"{experiment} seed-{seed}"
    if isinstance(found, str):
        return CellResult(model, name, "not run", found)
    try:
        found.result()
    except Exception as error:
        return CellResult(model, name, "failed", one_line(error))
    return CellResult(model, name, "done")


def show_plan(study: Study) -> None:
    """Print what would run, without running it."""
    rows = [
        (experiment.key, experiment.title, len(experiment.lines), "every seed" if experiment.every_seed else "one seed")
        for experiment in (EXPERIMENTS[key] for key in study.experiments)
    ]
    shown: Sequence[Sequence[str]] = [[str(value) for value in row] for row in rows]
    console.print(table("Experiments", ("key", "what", "lines", "seeds"), shown))
    family = study.family()
    console.print(f"\n{len(study.parts())} experiments to measure, {len(family.cells)} lines, results in {study.out}")


def command(
    file: Annotated[Path, typer.Argument(help="Ablations file: models, seeds and the settings of every line.")],
    experiment: Annotated[list[str] | None, typer.Option(help="Only this experiment, E1 ... E20 (repeatable).")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only this model of the file (repeatable).")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds instead of those of the file (repeatable).")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of evaluation text.", min=1)] = None,
    page: Annotated[Path | None, typer.Option(help="Markdown file to write; table and figures go beside it.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value (repeatable).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run.")] = False,
) -> None:
    """Run the experiments on the models of an ablations file, as far as that is not done already."""
    changes = [*(overrides or []), *([] if windows is None else [f"evaluate.windows={windows}"])]
    study = load_study(file, experiments=experiment or (), models=model or (), seeds=seed or (), overrides=changes)
    if dry_run:
        show_plan(study)
        return
    if not study.parts():
        raise RwkvqError(f"{file}: nothing to measure; choose an experiment")
    connect()
    runner = task_runner(study.family().cells[0].run)
    quiet = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
    with lost_server_named(), quiet:
        ablations.with_options(task_runner=runner)(study, study.out, None if page is None else str(page))


def main() -> None:
    """Entry point with the exit codes of the `rwkvq` command."""
    run_command(command)


if __name__ == "__main__":
    main()
