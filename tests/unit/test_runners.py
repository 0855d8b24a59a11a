"""The task runner that each setting chooses, and what is said when it cannot be had."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("prefect")

from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from flows.runners import task_runner
from rwkvq.errors import RwkvqError
from rwkvq.run import Run
from tests.small import settings_of


def run_of(*overrides: str) -> Run:
    return Run(settings_of({"run": {"workers": 3}}, *overrides))


@pytest.fixture
def listening() -> Iterator[int]:
    """A port on which somebody answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free() -> int:
    """A port on which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_threads_and_processes() -> None:
    threads, processes = task_runner(run_of()), task_runner(run_of("run.runner=processes"))
    assert isinstance(threads, ThreadPoolTaskRunner) and threads._max_workers == 3
    assert isinstance(processes, ProcessPoolTaskRunner) and processes._max_workers == 3


def test_dask_here_and_at_an_address(listening: int) -> None:
    pytest.importorskip("prefect_dask")
    here = task_runner(run_of("run.runner=dask"))
    assert here.cluster_kwargs["n_workers"] == 3 and here.cluster_kwargs["threads_per_worker"] == 1
    there = task_runner(run_of("run.runner=dask", f"run.dask_address=tcp://127.0.0.1:{listening}"))
    assert there.address == f"tcp://127.0.0.1:{listening}"


def test_ray_here_and_at_an_address(listening: int) -> None:
    pytest.importorskip("prefect_ray")
    pytest.importorskip("ray")
    assert task_runner(run_of("run.runner=ray")).init_kwargs["num_cpus"] == 3
    there = task_runner(run_of("run.runner=ray", f"run.ray_address=ray://127.0.0.1:{listening}"))
    assert there.address == f"ray://127.0.0.1:{listening}"


@pytest.mark.parametrize(("extra", "module"), [("dask", "prefect_dask"), ("ray", "ray")])
def test_a_missing_extra_is_one_line_with_the_command(extra: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RwkvqError) as caught:
        task_runner(run_of(f"run.runner={extra}"))
    assert str(caught.value) == f"run.runner: {extra} needs the extra `{extra}`; pip install 'rwkvq[{extra}]'"


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_an_address_without_answer_is_one_line(runner: str, free: int) -> None:
    pytest.importorskip(f"prefect_{runner}")
    with pytest.raises(RwkvqError, match=f"run.{runner}_address tcp://127.0.0.1:{free}: no answer") as caught:
        task_runner(run_of(f"run.runner={runner}", f"run.{runner}_address=tcp://127.0.0.1:{free}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["tcp://host", "tcp://host:notaport", "nonsense"])
def test_an_address_of_another_form_is_said(address: str) -> None:
    pytest.importorskip("prefect_dask")
    with pytest.raises(RwkvqError, match="expected PROTOCOL://HOST:PORT"):
        task_runner(run_of("run.runner=dask", f"run.dask_address={address}"))
