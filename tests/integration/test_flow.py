"""The Prefect flow as a user starts it: a command with a data base of its own, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
import torch
import yaml

from rwkvq.run import Run
from rwkvq.stages import run_stage
from tests.processes import eventually, free_port
from tests.small import LINE, settings_of, tree_hash

pytest.importorskip("prefect")

REPOSITORY = Path(__file__).parents[2]
WATCH = """
import os, sys
def watch(event, arguments):
    if event == "socket.connect":
        with open(os.environ["CONNECTIONS"], "a") as file:
            print(repr(arguments[1]), file=file)
sys.addaudithook(watch)
"""
"""A sitecustomize module that notes every connection of every process below."""


@dataclass
class Home:
    """A Prefect home and the run of the tiny model that reports to it."""

    folder: Path
    values: dict[str, Any]
    environment: dict[str, str]

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        """Start the flow on a run folder of its own."""
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.values))
        sets = [part for override in overrides for part in ("--set", override)]
        return subprocess.Popen(
            [sys.executable, "-m", "flows.quantize_model", "--params", str(self.folder / "params.yaml"), *sets],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str], code: int = 0) -> str:
        """Wait for the flow, check its exit code and that it leaves no process behind; return its log."""
        _, log = process.communicate()
        assert process.returncode == code, log
        assert "Traceback" not in log
        assert eventually(lambda: not self.processes())
        return log

    def processes(self) -> list[psutil.Process]:
        """Everything that runs with this home."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("PREFECT_HOME") == self.environment["PREFECT_HOME"]:
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]

    def worker(self) -> psutil.Process:
        """A worker process of the running flow."""
        found: list[psutil.Process] = []
        assert eventually(
            lambda: found.extend(item for item in self.processes() if "rwkvq.worker_main" in item.cmdline()) or found
        )
        return found[0]


@pytest.fixture(scope="module")
def home(undisturbed: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("flow")
    (folder / "sitecustomize.py").write_text(WATCH)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "DO_NOT_TRACK"))}
    environment |= {
        "PREFECT_HOME": str(folder / "prefect"),
        "CONNECTIONS": str(folder / "connections"),
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    return Home(folder, undisturbed[1] | {"run_dir": str(folder / "run"), "run": {"workers": 2}}, environment)


@pytest.fixture(scope="module")
def first_log(home: Home) -> str:
    return home.finish(home.start())


def assert_same_artifact(home: Home, undisturbed: tuple[Path, dict[str, Any]], run_dir: str = "run") -> None:
    assert tree_hash(home.folder / run_dir / "artifact") == tree_hash(undisturbed[0] / "run" / "artifact")


def test_it_needs_no_set_up_and_gives_the_bytes_of_the_command(
    home: Home, first_log: str, undisturbed: tuple[Path, dict[str, Any]]
) -> None:
    assert_same_artifact(home, undisturbed)
    said = [line.split(": ")[1] for line in first_log.splitlines() if ": done in" in line]
    assert said == list(LINE)


def test_nothing_leaves_this_machine(home: Home, first_log: str) -> None:
    connections = (home.folder / "connections").read_text().splitlines()
    assert connections
    assert [line for line in connections if not line.startswith(("('127.0.0.1'", "('::1'", "'"))] == []


def test_a_second_run_does_nothing(home: Home, first_log: str) -> None:
    before = tree_hash(home.folder / "run")
    log = home.finish(home.start())
    assert [line.split(" ", 1)[1] for line in log.splitlines() if ":" in line] == [
        f"run: {s}: up to date" for s in LINE
    ]
    assert tree_hash(home.folder / "run") == before


def test_bad_input_is_one_line_and_is_not_tried_again(home: Home) -> None:
    weights = torch.load(home.values["model"], weights_only=True)
    weights["blocks.1.att.key.weight"][0, 0] = float("nan")
    torch.save(weights, home.folder / "nan.pth")
    log = home.finish(home.start(f"model={home.folder / 'nan.pth'}", f"run_dir={home.folder / 'nan'}"), code=1)
    errors = [line for line in log.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "blocks.1.att.key.weight holds NaN" in errors[0]
    assert "Retry" not in log


def test_a_server_that_does_not_answer_is_named(home: Home) -> None:
    home = Home(home.folder, home.values, home.environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"})
    log = home.finish(home.start(), code=1)
    assert log.startswith("error: PREFECT_API_URL http://127.0.0.1:9/api") and log.count("\n") == 1


@contextmanager
def child(environment: dict[str, str], port: int, *command: object) -> Iterator[None]:
    """A server process that answers on `port`."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        with socket.socket() as probe:
            assert eventually(lambda: probe.connect_ex(("127.0.0.1", port)) == 0)
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["processes", "dask"])
def test_every_runner_gives_the_same_bytes(home: Home, undisturbed: tuple[Path, dict[str, Any]], runner: str) -> None:
    log = home.finish(home.start(f"run_dir={home.folder / runner}", f"run.runner={runner}"))
    assert f"2 workers ({runner})" in log
    assert "temporary server" not in log
    assert_same_artifact(home, undisturbed, runner)


@pytest.mark.slow
def test_a_running_dask_cluster_is_used(home: Home, undisturbed: tuple[Path, dict[str, Any]]) -> None:
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    with (
        child(os.environ | {}, port, "-m", "distributed.cli.dask_scheduler", "--port", port, "--no-dashboard"),
        child(os.environ | {}, port, "-m", "distributed.cli.dask_worker", address, "--no-dashboard", "--nthreads", 2),
    ):
        overrides = f"run_dir={home.folder / 'cluster'}", "run.runner=dask", f"run.dask_address={address}"
        home.finish(home.start(*overrides))
    assert_same_artifact(home, undisturbed, "cluster")


@pytest.mark.slow
def test_a_real_server_shows_runs_and_artifacts(home: Home) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    server = "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"
    with child(home.environment | {"PREFECT_HOME": str(home.folder / "server")}, port, *server):
        user = Home(home.folder, home.values, home.environment | {"PREFECT_API_URL": url})
        user.finish(user.start(f"run_dir={home.folder / 'served'}"))
        tasks = {item["name"]: item["state_type"] for item in ask(f"{url}/task_runs/filter")}
        flows = {item["name"]: item for item in ask(f"{url}/flow_runs/filter")}
        artifacts = {item["key"]: item for item in ask(f"{url}/artifacts/filter")}
        logs = ask(f"{url}/logs/filter")
    assert {*LINE} - {"quantize"} | {"quantize-block-000", "quantize-block-001"} <= {*tasks}
    assert set(tasks.values()) == {"COMPLETED"}
    assert flows[str(home.folder / "served")]["parameters"]["settings"]["quantize"]["bits"] == 3
    assert {key: item["type"] for key, item in artifacts.items()} == {
        **dict.fromkeys(LINE, "progress"),
        "result": "table",
        "report": artifacts["report"]["type"],
    }
    assert artifacts["quantize"]["data"] == 100.0
    assert any("quantize: done in" in item["message"] for item in logs)


def ask(url: str) -> list[dict[str, Any]]:
    """Everything that a filter of Prefect's API gives."""
    request = Request(url, b"{}", {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        values: list[dict[str, Any]] = json.load(answer)
        return values


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "flow"])
def test_a_killed_process_costs_no_work_and_no_bytes(
    home: Home, undisturbed: tuple[Path, dict[str, Any]], victim: str
) -> None:
    name = f"killed-{victim}"
    process = home.start(f"run_dir={home.folder / name}", "run.workers=1")
    assert eventually(lambda: list((home.folder / name).glob("quantized/*/*.safetensors")))
    if victim == "worker":
        home.worker().kill()
        assert "Retry 1/1" in home.finish(process)
    else:
        process.kill()
        process.wait()
        assert eventually(lambda: not home.processes())
        home.finish(home.start(f"run_dir={home.folder / name}"))
    assert_same_artifact(home, undisturbed, name)


@pytest.mark.slow
def test_a_block_that_hangs_is_stopped_at_the_time_limit(home: Home) -> None:
    run = Run(settings_of(home.values, f"run_dir={home.folder / 'hanging'}"))
    for stage in ("windows", "activations", "proxies", "plan"):
        run_stage(run, stage)
    process = home.start(f"run_dir={run.folder}", "run.task_timeout=8", "run.workers=1")
    home.worker().send_signal(signal.SIGSTOP)
    log = home.finish(process, code=1)
    last = log.splitlines()[-1]
    assert last.startswith("error: block-00") and "still running after 8 s and stopped" in last
    assert "Retry" not in log
