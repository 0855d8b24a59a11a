"""One undisturbed run for all tests that break, inspect or repeat one, and workers that are started once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rwkvq import stages
from rwkvq.run import Run
from rwkvq.workers import WorkerPool
from tests.small import settings_of, write_inputs


class SharedPool(WorkerPool):
    """The workers of all tests that do not harm them: a worker takes seconds to start."""

    started: ClassVar[WorkerPool | None] = None

    def __init__(self, workers: int, threads: int, *, one_process: bool = False) -> None:
        if SharedPool.started is None:
            SharedPool.started = WorkerPool(1, 1)

    def run(self, *arguments: Any, **options: Any) -> Any:
        assert SharedPool.started is not None
        return SharedPool.started.run(*arguments, **options)

    def close(self) -> None:
        """Left to the end of the session."""


@pytest.fixture(scope="session")
def pool_of_session() -> Iterator[None]:
    yield
    if SharedPool.started is not None:
        SharedPool.started.close()


@pytest.fixture
def shared_workers(pool_of_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this process use the shared workers."""
    monkeypatch.setattr("rwkvq.run.WorkerPool", SharedPool)


@pytest.fixture(scope="session")
def undisturbed(pool_of_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, settings values) of one finished run in FOLDER/run; tests only read it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    values = write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwkvq.run.WorkerPool", SharedPool)
        stages.run_line(Run(settings_of(values)))
    return folder, values


@pytest.fixture
def inputs(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the inputs, without the run."""
    folder = tmp_path / "in"
    shutil.copytree(undisturbed[0], folder, ignore=shutil.ignore_patterns("run"))
    return folder
