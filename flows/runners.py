"""Where the tasks of a flow run: Prefect's task runner by `run.runner`."""

from __future__ import annotations

import os
import socket
from typing import Any
from urllib.parse import urlsplit

from prefect.futures import PrefectFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from rwkvq.errors import RwkvqError
from rwkvq.redaction import without_secrets
from rwkvq.run import Run

CONNECT_SECONDS = 10.0

Runner = TaskRunner[PrefectFuture[Any]]


def task_runner(run: Run) -> Runner:
    """The runner that `run.runner` names, with run.workers workers, or those of the cluster that an address names.

    Raises RwkvqError: the extra is not installed, or nobody answers at the address. Tasks on another machine report to
    the server that PREFECT_API_URL names, so it has to be one that they reach.
    """
    limits = run.settings.run
    if limits.runner == "processes":
        return ProcessPoolTaskRunner(max_workers=run.workers)
    if limits.runner == "dask":
        return _dask(run.workers, limits.dask_address)
    if limits.runner == "ray":
        return _ray(run.workers, limits.ray_address)
    return ThreadPoolTaskRunner(max_workers=run.workers)


def _dask(workers: int, address: str | None) -> Runner:
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise _missing("dask") from error
    if address:
        _check_answers("run.dask_address", address)
        return DaskTaskRunner(address=address)
    cluster = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    return DaskTaskRunner(cluster_kwargs=cluster)


def _ray(workers: int, address: str | None) -> Runner:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray starts; nothing is sent anywhere
    try:
        import ray  # noqa: F401 - prefect_ray imports it only when the flow has begun
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise _missing("ray") from error
    if address:
        _check_answers("run.ray_address", address)
        return RayTaskRunner(address=address)
    return RayTaskRunner(init_kwargs={"num_cpus": workers, "include_dashboard": False, "logging_level": "ERROR"})


def _missing(extra: str) -> RwkvqError:
    return RwkvqError(f"run.runner: {extra} needs the extra `{extra}`; pip install 'rwkvq[{extra}]'")


def _check_answers(setting: str, address: str) -> None:
    """Fail in seconds and one line where the client of the cluster would take minutes and pages."""
    shown = without_secrets(address)
    try:
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        place = parts.hostname, parts.port
    except ValueError:
        place = None, None
    if None in place:
        raise RwkvqError(f"{setting} {shown}: expected PROTOCOL://HOST:PORT")
    try:
        socket.create_connection(place, CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or error
        raise RwkvqError(
            f"{setting} {shown}: no answer ({reason}); start the cluster, or correct the address"
        ) from error
