"""The Prefect server is killed, or is not to be had: no work is lost, and the flow goes on where it can."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from flows.server import LostEvents
from tests.faults.flow import TENSOR, Flow, Started, eventually, server
from tests.processes import free_port

AGAIN = "Prefect's embedded server: killed by signal 9; starting it again"


def replaced(command: Started) -> None:
    """Kill the embedded server and wait for the next one."""
    before = command.server()
    before.kill()
    assert eventually(lambda: [process for process in command.family("flows.server") if process.pid != before.pid])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "file"), [("windows", "windows.parquet"), ("quantize", TENSOR), ("report", "report.html")]
)
def test_a_killed_embedded_server_is_replaced(alone: Flow, stage: str, file: str) -> None:
    alone.prepare(stage)
    command = alone.paused(file)
    kept = alone.tensors()
    replaced(command)
    command.resume()
    log = command.finish()
    assert log.count(AGAIN) == 1
    assert "error" not in log.lower().replace(AGAIN.lower(), "")
    alone.assert_same(kept)


@pytest.mark.slow
def test_an_embedded_server_that_dies_at_once_ends_the_flow_in_one_line(alone: Flow) -> None:
    alone.prepare("quantize")
    command = alone.paused(TENSOR)
    kept = alone.tensors()
    replaced(command)
    replaced(command)
    command.server().kill()
    command.resume()
    command.fail("embedded server: killed by signal 9, 3 times within 60 s", "finished work is kept")
    alone.start().finish()
    alone.assert_same(kept)


@pytest.mark.slow
def test_a_killed_server_of_ones_own_that_comes_back_loses_nothing(alone: Flow) -> None:
    alone.prepare("quantize")
    port = free_port()
    with server(alone.environment | {"PREFECT_HOME": str(alone.folder / "server")}, port):
        command = alone.paused(TENSOR, PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
        kept = alone.tensors()
    command.resume()  # the server is dead by now
    with server(alone.environment | {"PREFECT_HOME": str(alone.folder / "server")}, port):
        command.process.wait(timeout=400)
        if command.process.returncode:  # it asked while nobody answered
            command.fail(f"http://127.0.0.1:{port}/api", "finished work is kept")
            alone.start(PREFECT_API_URL=f"http://127.0.0.1:{port}/api").finish()
    alone.assert_same(kept)


@pytest.mark.slow
def test_a_server_of_ones_own_that_is_gone_for_good_ends_the_flow_in_one_line(alone: Flow) -> None:
    alone.prepare("quantize")
    port = free_port()
    with server(alone.environment | {"PREFECT_HOME": str(alone.folder / "server")}, port):
        command = alone.paused(TENSOR, PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
        kept = alone.tensors()
    command.resume()
    command.fail(f"http://127.0.0.1:{port}/api", "finished work is kept")
    alone.start().finish()
    alone.assert_same(kept)


@pytest.mark.slow
def test_a_proxy_that_leads_nowhere_is_not_asked(alone: Flow) -> None:
    alone.prepare("pack")
    nowhere = "http://127.0.0.1:9"
    alone.start(HTTP_PROXY=nowhere, http_proxy=nowhere, HTTPS_PROXY=nowhere, ALL_PROXY=nowhere).finish()
    alone.assert_same()


def test_a_prefect_home_that_cannot_be_written_is_one_line(alone: Flow, tmp_path: Path) -> None:
    alone.prepare("pack")
    (tmp_path / "file").write_text("in the way")
    alone.start(PREFECT_HOME=str(tmp_path / "file" / "home")).fail(tmp_path / "file")


def test_events_that_did_not_arrive_are_said_once_and_briefly() -> None:
    quieter = LostEvents()
    said = ["Unable to connect to 'ws://a'", "Service 'EventsWorker' failed to process item Event(...)"] * 2 + ["other"]
    records = [logging.LogRecord("prefect", logging.ERROR, __file__, 1, line, None, None) for line in said]
    assert [record.getMessage() for record in records if quieter.filter(record)] == [
        "Unable to connect to 'ws://a'",
        "other",
    ]
