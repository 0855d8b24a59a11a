"""Scheduled families: `python -m flows.serve families/*.yaml` makes a Prefect deployment of each and runs what is due.

Needs a Prefect server. With `--work-pool` the deployments are only registered, for the workers of that pool.
docs/schedules.md has every command.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from zoneinfo import available_timezones

# before Prefect is imported, like those of flows/__init__.py; the server shows the log of each run
os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "true")

import typer
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner
from prefect.schedules import Cron, Schedule
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType

from flows.command import run_command
from flows.quantize_family import quantize_family
from rwkvq.errors import RwkvqError, SettingsError
from rwkvq.family.family import Family, load_family

START = "start one with `prefect server start` and name it: export PREFECT_API_URL=http://127.0.0.1:4200/api"
HANDED_ON = ("DO_NOT_TRACK", "PREFECT_LOGGING_SETTINGS_PATH", "PREFECT_LOGGING_TO_API_ENABLED")
"""Variables that the runs of a work pool get, too; those of this process inherit its environment."""


def command(
    files: Annotated[list[Path], typer.Argument(help="Family files.")],
    work_pool: Annotated[str | None, typer.Option(help="Register for the workers of this pool and return.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value (repeatable).")] = None,
    cron: Annotated[str | None, typer.Option(help='Instead of the files\' schedules, for example "0 2 * * *".')] = None,
    pause: Annotated[bool | None, typer.Option("--pause/--no-pause", help="Instead of the files' `paused`.")] = None,
    limit: Annotated[int, typer.Option(help="Families that this process runs at the same time.", min=1)] = 1,
) -> None:
    """Make a deployment of each family file and run it when it is due or triggered, until interrupted."""
    families = [load_family(path, overrides or []) for path in files]
    _check_names(families)
    schedules = [schedule_of(family, cron, pause) for family in families]
    _check_server()
    if pause is None:
        schedules = [_as_on_server(*pair) for pair in zip(families, schedules, strict=True)]
    deployments = [deployment_of(*pair, overrides or []) for pair in zip(families, schedules, strict=True)]
    if work_pool is not None:
        _register(deployments, work_pool)
        return
    asyncio.run(_serve(deployments, limit))


def schedule_of(family: Family, cron: str | None, pause: bool | None) -> Schedule | None:
    """When the family is due: `cron` and `pause` or what its file says; None if neither gives a time.

    A paused family has a schedule that is not active, which `prefect deployment schedule resume` can change (a paused
    deployment it cannot). Raises SettingsError with what is wrong with the time.
    """
    given = family.file.schedule
    cron = cron or (given.cron if given else None)
    if cron is None:
        return None
    timezone = given.timezone if given else "UTC"
    problems = []
    if timezone not in available_timezones():
        problems.append(f"schedule.timezone: {timezone!r} is no time zone; give one such as UTC or Europe/Berlin")
    try:
        Cron(cron)
        is_time = len(cron.split()) == 5
    except ValueError:
        is_time = False
    if not is_time:
        problems.append(f'schedule.cron: {cron!r} is no time; give minute, hour, day, month, weekday: "0 2 * * *"')
    if problems:
        raise SettingsError(str(family.path), problems)
    paused = pause if pause is not None else bool(given and given.paused)
    return Cron(cron, timezone=timezone, active=not paused)


def _as_on_server(family: Family, schedule: Schedule | None) -> Schedule | None:
    """The schedule, paused or active as the server has it: what a person paused stays so when this process restarts."""
    if schedule is None:
        return None
    with get_client(sync_client=True) as client:
        try:
            there = client.read_deployment_by_name(f"{quantize_family.name}/{family.name}").schedules
        except ObjectNotFound:
            return schedule
    for known in there:
        if isinstance(known.schedule, CronSchedule) and (known.schedule.cron, known.schedule.timezone) == (
            schedule.cron,
            schedule.timezone,
        ):
            return replace(schedule, active=known.active)
    return schedule


def deployment_of(family: Family, schedule: Schedule | None, overrides: Sequence[str]) -> RunnerDeployment:
    """The deployment of a family, named after it. One run of it at a time: what is due meanwhile waits."""
    return RunnerDeployment.from_flow(
        quantize_family,
        name=family.name,
        schedule=schedule,
        paused=False,
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        parameters={"family_file": str(family.path), "overrides": list(overrides)},
        description=_description(family),
        tags=["rwkvq", family.name],
        version=_revision(),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def _state(deployment: RunnerDeployment) -> str:
    """When the deployment is due, for the terminal."""
    for entry in deployment.schedules or []:
        assert isinstance(entry.schedule, CronSchedule)  # from schedule_of
        when = f"{entry.schedule.cron} {entry.schedule.timezone}"
        return when if entry.active else f"{when}, paused: prefect deployment schedule resume, or --no-pause"
    return "no schedule"


def _description(family: Family) -> str:
    """What the family is, for the UI."""
    models = ", ".join(dict.fromkeys(cell.model for cell in family.cells))
    policies = ", ".join(dict.fromkeys(cell.policy for cell in family.cells))
    return f"{len(family.cells)} cells of {family.path}: models {models}; policies {policies}; results in {family.out}"


def _revision() -> str | None:
    """The git revision of this checkout, `-dirty` if it has changes; None outside git."""
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.strip() or None


def _check_names(families: Sequence[Family]) -> None:
    """Raises SettingsError where two files give the same family: the second would replace the first."""
    seen: dict[str, Path] = {}
    for family in families:
        if family.name in seen:
            raise SettingsError(
                str(family.path), [f"family: {family.name!r} is also that of {seen[family.name]}; rename"]
            )
        seen[family.name] = family.path


def _check_server() -> None:
    """Raises RwkvqError unless a server is named and answers."""
    url = get_current_settings().api.url
    if not url:
        raise RwkvqError(f"schedules need a Prefect server, and PREFECT_API_URL names none; {START}")
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem is not None:
        raise RwkvqError(f"PREFECT_API_URL {url}: no answer ({type(problem).__name__}); {START}")


class PoliteRunner(Runner):
    """A Prefect runner that on SIGTERM and Ctrl-C cancels its runs, pauses its schedules and returns.

    Prefect's own handler of SIGTERM leaves the runs to be killed, and the server believing that they go on.
    """

    _stop: asyncio.Task[None] | None = None

    def handle_sigterm(self, *_: object) -> None:
        """Installed by `start` as the handler of SIGTERM."""
        asyncio.get_running_loop().call_soon_threadsafe(self.request_stop)

    def request_stop(self) -> None:
        """Begin to stop, once; called in the event loop."""
        if self._stop is None:
            print("stopping: runs are cancelled, finished work is kept", file=sys.stderr)
            self._stop = asyncio.create_task(self.astop())


async def _serve(deployments: Sequence[RunnerDeployment], limit: int) -> None:
    """Run what is due, until a signal."""
    runner = PoliteRunner(limit=limit)
    for deployment in deployments:
        await runner.aadd_deployment(deployment)
        print(f"serving {deployment.full_name}: {_state(deployment)}", file=sys.stderr)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, runner.request_stop)
    await runner.start()


def _register(deployments: Sequence[RunnerDeployment], pool: str) -> None:
    """Register for the workers of `pool`. Their runs work in this folder. Raises RwkvqError without that pool."""
    with get_client(sync_client=True) as client:
        try:
            kind = client.read_work_pool(pool).type
        except ObjectNotFound as error:
            raise RwkvqError(
                f"work pool {pool!r}: not on the server; make it: prefect work-pool create {pool} --type process"
            ) from error
    if kind != "process":
        raise RwkvqError(f"work pool {pool!r}: has type {kind}, expected process; runs need the files of this machine")
    for deployment in deployments:
        deployment.job_variables = {
            "working_dir": str(Path.cwd()),
            "env": {name: os.environ[name] for name in HANDED_ON},
        }
        deployment.apply(work_pool_name=pool)
        print(f"{deployment.full_name}: registered for work pool {pool}, {_state(deployment)}", file=sys.stderr)
    print(f"start a worker: prefect worker start --pool {pool}", file=sys.stderr)


def main() -> None:
    """Entry point with the exit codes of the `rwkvq` command."""
    run_command(command)


if __name__ == "__main__":
    main()
