"""One undisturbed run to compare with, and the flow on a run folder of each test."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.faults.flow import Flow, Undisturbed, environment_of, server
from tests.integration.conftest import pool_of_session, undisturbed
from tests.processes import free_port

__all__ = ["pool_of_session", "undisturbed"]

collect_ignore_glob = [] if find_spec("prefect") else ["test_*.py"]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Prefect home whose data base is made once."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def alone(undisturbed: Undisturbed, tmp_path: Path, home: Path) -> Iterator[Flow]:
    """The flow with its embedded server."""
    flow = Flow(tmp_path, undisturbed, environment_of(home))
    yield flow
    flow.end()


@pytest.fixture(scope="session")
def api(home: Path) -> Iterator[str]:
    """A Prefect server that nobody harms: an embedded one takes seconds to start."""
    port = free_port()
    with server(environment_of(home / "api"), port):
        yield f"http://127.0.0.1:{port}/api"


@pytest.fixture
def flow(alone: Flow, api: str) -> Flow:
    """The flow, reporting to that server."""
    alone.environment["PREFECT_API_URL"] = api
    return alone
