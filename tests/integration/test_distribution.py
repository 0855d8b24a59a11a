"""Stage `quantize` over task runners and machines: the same bytes wherever a block runs and whoever is killed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.processes import eventually, free_port
from tests.small import tree_hash

pytest.importorskip("prefect")
pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
BEFORE = ("windows.parquet", "activations", "proxies.parquet", "plan.json")


@dataclass(frozen=True)
class Sender:
    """A machine with a run before stage `quantize`, in a folder that its settings name only from inside."""

    folder: Path
    values: dict[str, Any]
    environment: dict[str, str]
    expected: dict[str, str]

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        """Start the flow, in the folder."""
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.values))
        command = [sys.executable, "-m", "tests.block_flow", "params.yaml", *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True, **pipes)

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Wait for the flow, check that it gave the bytes of an undisturbed run, return its log."""
        log, _ = process.communicate()
        assert process.returncode == 0, log
        assert tree_hash(self.folder / "run" / "quantized") == self.expected
        return log

    def workers(self) -> list[psutil.Process]:
        """Worker processes that run with this machine's cache."""
        found = []
        for process in psutil.process_iter():
            try:
                is_here = process.environ().get("RWKVQ_CACHE") == self.environment["RWKVQ_CACHE"]
                if is_here and "rwkvq.worker_main" in process.cmdline():
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a Prefect server for all flows of this module: it takes longer to start than they take to run."""
    folder = tmp_path_factory.mktemp("server")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "DO_NOT_TRACK"))}
    environment |= {"PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    port = free_port()
    command = "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"
    with process(environment, folder / "work", *command):
        assert eventually(lambda: answers(port))
        yield environment | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}


@pytest.fixture
def sender(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, api: dict[str, str]) -> Sender:
    source, values = undisturbed
    folder = tmp_path / "sender"
    (folder / "run").mkdir(parents=True)
    shutil.copy(source / "model.pth", folder)
    for name in BEFORE:
        place = source / "run" / name
        (shutil.copytree if place.is_dir() else shutil.copyfile)(place, folder / "run" / name)
    environment = api | {"RWKVQ_CACHE": str(tmp_path / "cache")}
    relative = values | {"model": "model.pth", "run_dir": "run", "run": {"workers": 2}}
    return Sender(folder, relative, environment, tree_hash(source / "run" / "quantized"))


def answers(port: int) -> bool:
    """Whether somebody listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def process(environment: dict[str, str], folder: Path, *command: object) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process of a cluster, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    child = subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, env=environment)
    try:
        yield child
    finally:
        child.terminate()
        child.wait()


@contextmanager
def dask_cluster(sender: Sender, tmp_path: Path) -> Iterator[tuple[str, list[psutil.Process]]]:
    """Address of a scheduler, and its two workers, each in a folder and with a cache of its own."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    with ExitStack() as stack:
        scheduler = "-m", "distributed.cli.dask_scheduler", "--port", port, "--no-dashboard", "--host", "127.0.0.1"
        stack.enter_context(process(sender.environment, tmp_path / "scheduler", *scheduler))
        assert eventually(lambda: answers(port))
        workers = []
        for name in ("first", "second"):
            own = sender.environment | {"RWKVQ_CACHE": str(tmp_path / name / "cache")}
            worker = (
                "-m",
                "distributed.cli.dask_worker",
                address,
                "--no-dashboard",
                "--nthreads",
                1,
                "--no-nanny",
                "--death-timeout",
                60,
            )
            started = stack.enter_context(process(own, tmp_path / name, *worker))
            workers.append(psutil.Process(started.pid))
        yield address, workers


@pytest.mark.parametrize("runner", ["threads", "processes", "dask", "ray"])
def test_every_runner_gives_the_same_bytes_through_a_store(sender: Sender, tmp_path: Path, runner: str) -> None:
    if runner in ("dask", "ray"):
        pytest.importorskip(f"prefect_{runner}")
    log = sender.finish(sender.start(f"run.runner={runner}", f"run.store=file://{tmp_path}/store"))
    assert "Traceback" not in log
    assert len(list((tmp_path / "store" / "objects").iterdir())) == 1  # the checkpoint
    assert list((tmp_path / "store" / "results").iterdir()) == []


def test_machines_that_do_not_see_the_run_folder_share_the_work(sender: Sender, tmp_path: Path) -> None:
    pytest.importorskip("prefect_dask")
    with dask_cluster(sender, tmp_path) as (address, _):
        cluster = "run.runner=dask", f"run.dask_address={address}"
        without, _ = sender.start(*cluster, "run.retries=0").communicate()
        assert "model.pth: no such file or folder" in without  # they really do not see it
        sender.finish(sender.start(*cluster, f"run.store=file://{tmp_path}/store"))
    assert list(tmp_path.glob("*/cache/checkpoints/*/model.pth"))
    assert [path for path in tmp_path.glob("*/cache/jobs/*") if path.is_dir()] == []


def test_work_goes_on_when_a_machine_is_killed(sender: Sender, tmp_path: Path) -> None:
    pytest.importorskip("prefect_dask")
    with dask_cluster(sender, tmp_path) as (address, workers):
        running = sender.start("run.runner=dask", f"run.dask_address={address}", f"run.store=file://{tmp_path}/store")
        victims: list[psutil.Process] = []
        assert eventually(
            lambda: (
                list((tmp_path / "store").glob("results/*"))
                and victims.extend(worker for worker in workers if worker.children()) is None
                and victims
            )
        )
        victims[0].kill()
        sender.finish(running)


def test_a_killed_sender_finds_in_the_store_what_was_done(sender: Sender, tmp_path: Path) -> None:
    store = tmp_path / "store"
    arguments = "run.workers=1", f"run.store=file://{store}"
    running = sender.start(*arguments)
    assert eventually(lambda: len(list(store.glob("results/*"))) >= 2)
    running.kill()
    running.communicate()
    assert eventually(lambda: not sender.workers())
    kept = len(list(store.glob("results/*")))
    assert not list(sender.folder.glob("run/quantized/*/*")) and kept < len(sender.expected)
    log = sender.finish(sender.start(*arguments))
    assert sum(map(int, re.findall(r"done, (\d+) tensors", log))) == len(sender.expected) - kept


def test_damage_in_the_store_during_the_run_is_repaired(sender: Sender, tmp_path: Path) -> None:
    store = tmp_path / "store"
    running = sender.start("run.workers=1", f"run.store=file://{store}")
    assert eventually(lambda: list(store.glob("results/*")))
    for path in [*store.glob("results/*"), *store.glob("objects/*")]:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert "send it again" in sender.finish(running)
