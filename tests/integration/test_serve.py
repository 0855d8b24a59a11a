"""Schedules on a real Prefect server: what is due runs, what is paused does not, commands change both."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.commands import one_error_line
from tests.integration.test_flow import REPOSITORY, ask, child, eventually, free_port
from tests.small import write_inputs

pytest.importorskip("prefect")

ACTIVE, PAUSED = "minutely", "resting"
WAIT_SECONDS = 400


@dataclass
class Place:
    """A server, and family files for it."""

    folder: Path
    environment: dict[str, str]
    url: str = ""

    def family(self, name: str, **schedule: Any) -> Path:
        """Write the family file of one tiny model under one policy."""
        values = write_inputs(self.folder / "inputs")
        model, _ = values.pop("model"), values.pop("run_dir")
        content: dict[str, Any] = {
            "family": name,
            "out": str(self.folder / name),
            "settings": values,
            "models": {"tiny": {"model": model}},
            "policies": {"rtn": {"plan": {"policy": "rtn"}}},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content | ({"schedule": schedule} if schedule else {})))
        return path

    def prefect(self, *arguments: str) -> str:
        """What a `prefect` command prints."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=REPOSITORY,
            env=self.environment | {"COLUMNS": "300"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def deployment(self, name: str) -> dict[str, Any]:
        """The deployment of a family."""
        return next(item for item in ask(f"{self.url}/deployments/filter") if item["name"] == name)

    def runs(self, name: str) -> list[dict[str, Any]]:
        """All runs of a family, in whatever state."""
        key = self.deployment(name)["id"]
        return [run for run in ask(f"{self.url}/flow_runs/filter") if run["deployment_id"] == key]

    def completed(self, name: str) -> list[dict[str, Any]]:
        """Its completed runs."""
        runs = self.runs(name)
        assert not [run for run in runs if run["state_type"] in ("FAILED", "CRASHED")], runs
        return [run for run in runs if run["state_type"] == "COMPLETED"]

    def schedule(self, verb: str, name: str) -> None:
        """Pause or resume the schedule of a family as a user does it."""
        (key,) = re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", self.prefect("deployment", "schedule", "ls", full(name)))
        self.prefect("deployment", "schedule", verb, full(name), key)

    @contextmanager
    def serving(self, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
        """`python -m flows.serve` while the block lasts; its messages are in serve.log."""
        with (self.folder / "serve.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.serve", *map(str, arguments)],
                cwd=REPOSITORY,
                env=self.environment,
                stderr=log,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def log(self) -> str:
        """What the last `serving` said."""
        return (self.folder / "serve.log").read_text()


def full(name: str) -> str:
    return f"quantize-family/{name}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("serve")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(folder / "prefect"), "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
    port = free_port()
    server = "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"
    with child(environment, port, *server):
        url = f"http://127.0.0.1:{port}/api"
        yield Place(folder, environment | {"PREFECT_API_URL": url}, url)


def refusal(place: Place, *arguments: object, **environment: str) -> str:
    """The only line that a refused `flows.serve` leaves."""
    kept = {key: value for key, value in place.environment.items() if key != "PREFECT_API_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "flows.serve", *map(str, arguments)],
        cwd=REPOSITORY,
        env=kept | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    return one_error_line(done.stderr)


@pytest.mark.slow
def test_schedules_fire_unless_paused_and_obey_commands(place: Place) -> None:
    files = [
        place.family(ACTIVE, cron="* * * * *"),
        place.family(PAUSED, cron="* * * * *", paused=True),
    ]
    with place.serving(*files, "--limit", 2) as process:
        # the active one fires, at least twice, while the paused one gets nothing at all
        assert eventually(lambda: f"{full(PAUSED)}: * * * * * UTC, paused" in place.log(), WAIT_SECONDS)
        assert eventually(lambda: len(place.completed(ACTIVE)) >= 2, WAIT_SECONDS), place.log()
        assert all(run["auto_scheduled"] for run in place.completed(ACTIVE))
        assert (place.folder / ACTIVE / "summary.json").is_file()
        assert place.runs(PAUSED) == []

        # triggered by hand, it runs once
        place.prefect("deployment", "run", full(PAUSED))
        assert eventually(lambda: place.completed(PAUSED), WAIT_SECONDS), place.log()
        assert [run["auto_scheduled"] for run in place.runs(PAUSED)] == [False]

        # the two change places: from the first minute that one fires on, the other does not
        place.schedule("pause", ACTIVE)
        place.schedule("resume", PAUSED)
        assert eventually(lambda: len(place.completed(PAUSED)) >= 2, WAIT_SECONDS), place.log()
        fired = max(run["expected_start_time"] for run in place.completed(PAUSED))
        assert [run["id"] for run in place.runs(ACTIVE) if run["expected_start_time"] >= fired] == []

        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert place.deployment(PAUSED)["paused"], "nothing shall become due while nobody runs it"
    assert "Traceback" not in place.log()


@pytest.mark.slow
def test_a_pause_outlives_a_restart_and_a_stopped_run_is_cancelled(place: Place) -> None:
    file = place.family("restarted", cron="0 0 1 1 *")
    with place.serving(file) as process:
        assert eventually(lambda: full("restarted") in place.log())
        place.schedule("pause", "restarted")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    with place.serving(file) as process:
        assert eventually(lambda: f"{full('restarted')}: 0 0 1 1 * UTC, paused" in place.log())
        assert not place.deployment("restarted")["paused"]
        place.prefect("deployment", "run", full("restarted"))
        assert eventually(lambda: [run for run in place.runs("restarted") if run["state_type"] == "RUNNING"])
        process.send_signal(signal.SIGTERM)
        children = psutil.Process(process.pid).children(recursive=True)
        assert process.wait(120) == 0
        assert eventually(lambda: not [item for item in children if item.is_running()])
    assert [run["state_name"] for run in place.runs("restarted")] == ["Cancelled"]


@pytest.mark.slow
def test_a_worker_of_a_pool_runs_what_is_registered(place: Place, tmp_path: Path) -> None:
    file = place.family("pooled")
    assert "prefect work-pool create nights --type process" in refusal(
        place, file, "--work-pool", "nights", PREFECT_API_URL=place.url
    )
    place.prefect("work-pool", "create", "nights", "--type", "process")
    with place.serving(file, "--work-pool", "nights", "--set", "quantize.bits=4") as process:
        assert process.wait(120) == 0
    assert "prefect worker start --pool nights" in place.log()
    place.prefect("deployment", "run", full("pooled"))
    worker = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "nights"],
        cwd=tmp_path,
        env=place.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert eventually(lambda: place.completed("pooled"), WAIT_SECONDS)
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
    finally:
        worker.kill()
    manifest = (place.folder / "pooled" / "tiny" / "rtn" / "plan.json").read_text()
    assert place.runs("pooled")[0]["parameters"]["overrides"] == ["quantize.bits=4"]
    assert '"bits": 4' in manifest


def test_a_missing_server_is_one_line_that_says_how_to_start_one(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    place = Place(tmp_path, environment | {"PREFECT_HOME": str(tmp_path / "home")})
    file = place.family("alone", cron="0 2 * * *")
    assert "prefect server start" in refusal(place, file)
    nobody = f"http://127.0.0.1:{free_port()}/api"
    line = refusal(place, file, PREFECT_API_URL=nobody)
    assert nobody in line and "no answer" in line and "prefect server start" in line


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"cron": "61 2 * * *"}, "schedule.cron: '61 2 * * *'"),
        ({"cron": "0 0 2 * * *"}, "schedule.cron: '0 0 2 * * *'"),
        ({"cron": "0 2 * * *", "timezone": "Mars/Olympus"}, "schedule.timezone: 'Mars/Olympus'"),
    ],
)
def test_a_bad_time_is_one_line(tmp_path: Path, schedule: dict[str, str], words: str) -> None:
    place = Place(tmp_path, dict(os.environ))
    line = refusal(place, place.family("bad", **schedule))
    assert str(tmp_path / "bad.yaml") in line and words in line


def test_two_files_of_one_family_are_refused(tmp_path: Path) -> None:
    place = Place(tmp_path, dict(os.environ))
    file = place.family("twin")
    other = file.with_name("other.yaml")
    other.write_text(file.read_text())
    line = refusal(place, file, other)
    assert str(other) in line and str(file) in line and "rename" in line
