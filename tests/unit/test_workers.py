from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from rwkvq.errors import PlanError, RwkvqError
from rwkvq.workers import JobTimeout, Worker, WorkerDied, WorkerPool

HERE = "tests.unit.test_workers"


def ignore(event: dict[str, Any]) -> None:
    pass


def double(job: dict[str, Any], on_event: Any) -> dict[str, Any]:
    on_event({"half": job["x"]})
    print("a stray print must not break the protocol")
    return {"x": 2 * job["x"], "pid": os.getpid()}


def refuse(job: dict[str, Any], on_event: Any) -> None:
    raise PlanError("plan.json: wrong")


def crash(job: dict[str, Any], on_event: Any) -> None:
    raise ZeroDivisionError("oops")


def hang(job: dict[str, Any], on_event: Any) -> None:
    on_event({"pid": os.getpid()})
    time.sleep(600)


def die_once(job: dict[str, Any], on_event: Any) -> str:
    if not os.path.exists(job["mark"]):
        open(job["mark"], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


@pytest.fixture(scope="module")
def pool() -> Any:
    with WorkerPool(1, 1) as started:
        yield started


def run(pool: WorkerPool, name: str, job: dict[str, Any], **options: Any) -> Any:
    settings: dict[str, Any] = {"timeout": 120.0, "retries": 0, "on_event": ignore} | options
    return pool.run(f"{HERE}:{name}", job, **settings)


def test_answers_and_events_come_back_and_the_process_is_reused(pool: WorkerPool) -> None:
    events: list[dict[str, Any]] = []
    first = run(pool, "double", {"x": 3}, on_event=events.append)
    assert (first["x"], events) == (6, [{"half": 3}])
    assert run(pool, "double", {"x": 4})["pid"] == first["pid"] != os.getpid()


def test_the_error_of_a_job_keeps_its_kind_and_the_worker_lives_on(pool: WorkerPool) -> None:
    with pytest.raises(PlanError, match=r"plan\.json: wrong"):
        run(pool, "refuse", {})
    with pytest.raises(RwkvqError, match="ZeroDivisionError: oops"):
        run(pool, "crash", {})
    assert run(pool, "double", {"x": 1})["x"] == 2


def test_a_hanging_job_is_stopped_at_its_time_limit(pool: WorkerPool) -> None:
    pids: list[dict[str, Any]] = []
    with pytest.raises(JobTimeout, match="task_timeout"):
        run(pool, "hang", {}, timeout=3.0, on_event=pids.append)
    for item in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(item["pid"], 0)
    assert run(pool, "double", {"x": 1})["x"] == 2


def test_a_killed_worker_is_replaced_and_its_job_tried_again(pool: WorkerPool, tmp_path: Any) -> None:
    assert run(pool, "die_once", {"mark": str(tmp_path / "a")}, retries=1) == "alive"
    with pytest.raises(WorkerDied, match="signal 9"):
        run(pool, "die_once", {"mark": str(tmp_path / "b")}, retries=0)


def test_closing_the_pool_stops_a_busy_worker() -> None:
    pool = WorkerPool(1, 1)
    pids: list[dict[str, Any]] = []
    started = threading.Event()

    def note(event: dict[str, Any]) -> None:
        pids.append(event)
        started.set()

    failure: list[BaseException] = []

    def work() -> None:
        try:
            run(pool, "hang", {}, on_event=note)
        except RwkvqError as error:
            failure.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(60)
    pool.close()
    thread.join(30)
    assert "stopped together with the run" in str(failure[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0]["pid"], 0)


def test_a_worker_leaves_when_its_parent_closes_the_stream() -> None:
    worker = Worker(1)
    stream = worker._process.stdin
    assert stream is not None
    stream.close()
    worker._process.wait(timeout=60)
    assert not worker.is_alive()
