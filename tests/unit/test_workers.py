from __future__ import annotations

import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkvq.errors import ActivationError, OutOfMemory, PlanError, RwkvqError, is_out_of_memory
from rwkvq.workers import JobTimeout, Worker, WorkerDied, WorkerKilled, WorkerPool

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


def die(job: dict[str, Any], on_event: Any) -> None:
    os.kill(os.getpid(), job["signal"])


def allocate(job: dict[str, Any], on_event: Any) -> None:
    """Ask for more memory than this process may have, and wrap the refusal as a reader of files would."""
    with Path(job["calls"]).open("a") as calls:
        calls.write("called\n")
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
    try:
        torch.empty(1 << 40, dtype=torch.uint8)
    except RuntimeError as error:
        raise ActivationError("block-001.parquet: damaged") from error


def meet_and_die_once(job: dict[str, Any], on_event: Any) -> list[str]:
    """Wait for the other job, die with it, and when tried again say who runs at the same time."""
    folder, me, other = Path(job["folder"]), job["me"], job["other"]
    if not (folder / f"{me}-died").exists():
        (folder / f"{me}-here").touch()
        while not (folder / f"{other}-here").exists():
            time.sleep(0.01)
        (folder / f"{me}-died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"{me}-runs").touch()
    seen = [path.name for path in folder.glob("*-runs")]
    time.sleep(0.2)  # room for the other one to be seen, if it were allowed to run
    seen += [path.name for path in folder.glob("*-runs")]
    (folder / f"{me}-runs").unlink()
    return sorted(set(seen))


def meet(job: dict[str, Any], on_event: Any) -> dict[str, Any]:
    """Wait until the other job is there too."""
    folder = Path(job["folder"])
    (folder / job["me"]).touch()
    while not (folder / job["other"]).exists():
        time.sleep(0.01)
    on_event({"from": job["me"]})
    return {"me": job["me"], "pid": os.getpid()}


def take_the_other_along(job: dict[str, Any], on_event: Any) -> str:
    """The first time: wait for the other job, then job a ends the process that both are in."""
    folder = Path(job["folder"])
    if not (folder / "died").exists():
        meet(job, ignore)
        if job["me"] == "a":
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    return str(job["me"])


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
    with pytest.raises(JobTimeout, match=r"^block-007: still running after 3 s and stopped; raise run\.task_timeout$"):
        run(pool, "hang", {}, timeout=3.0, on_event=pids.append, label="block-007")
    for item in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(item["pid"], 0)
    assert run(pool, "double", {"x": 1})["x"] == 2


def test_a_killed_worker_is_replaced_and_its_job_tried_again(pool: WorkerPool, tmp_path: Any) -> None:
    assert run(pool, "die_once", {"mark": str(tmp_path / "a")}, retries=1) == "alive"
    with pytest.raises(WorkerDied, match="signal 9"):
        run(pool, "die_once", {"mark": str(tmp_path / "b")}, retries=0)


def test_what_runs_out_of_memory_beside_others_is_tried_again_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with WorkerPool(2, 1) as pool, ThreadPoolExecutor(2) as threads:
        jobs = [{"folder": str(tmp_path), "me": me, "other": other} for me, other in ("ab", "ba")]
        futures = [threads.submit(run, pool, "meet_and_die_once", job, label=f"job-{job['me']}") for job in jobs]
        assert [future.result() for future in futures] == [["a-runs"], ["b-runs"]]
        assert pool.slots == 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and sorted(line[:6] for line in said) == ["job-a:", "job-b:"]
    for line in said:
        assert line.endswith(
            "killed by signal 9, as the system does when memory runs out; going on with 1 of 2 workers"
        )


def test_with_one_worker_left_memory_counts_as_a_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with WorkerPool(2, 1) as pool:
        with pytest.raises(
            WorkerKilled, match=r"^block-003: worker \d+: killed by signal 9.* one worker left; free some"
        ):
            run(pool, "die", {"signal": signal.SIGKILL}, retries=2, label="block-003")
        assert pool.slots == 1
        assert run(pool, "double", {"x": 1})["x"] == 2
    said = [record.getMessage().rpartition("; ")[2] for record in caplog.records]
    assert said == ["going on with 1 of 2 workers", "trying again", "trying again"]


def test_a_refused_allocation_gives_way_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = tmp_path / "calls"
    with WorkerPool(2, 1) as pool:
        pids = {run(pool, "double", {"x": 1})["pid"]}
        with pytest.raises(OutOfMemory, match=r"^block-003: worker \d+: not enough memory .*; free some memory"):
            run(pool, "allocate", {"calls": str(calls)}, label="block-003")
        assert pool.slots == 1
        assert run(pool, "double", {"x": 1})["pid"] not in pids  # memory that was spent goes with its process
    assert calls.read_text().splitlines() == ["called"] * 2
    assert "going on with 1 of 2 workers" in caplog.text


def test_other_deaths_do_not_count_as_memory(caplog: pytest.LogCaptureFixture) -> None:
    with WorkerPool(2, 1) as pool:
        with pytest.raises(WorkerDied, match=r"worker \d+: killed by signal 11 before its job was done"):
            run(pool, "die", {"signal": signal.SIGSEGV}, retries=1, label="block-003")
        assert pool.slots == 2
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == ["trying again"]


def test_jobs_in_one_process_run_side_by_side_and_hear_only_of_themselves(tmp_path: Path) -> None:
    events: dict[str, list[dict[str, Any]]] = {"a": [], "b": []}
    with WorkerPool(2, 1, one_process=True) as pool, ThreadPoolExecutor(2) as threads:
        jobs = [{"folder": str(tmp_path), "me": me, "other": other} for me, other in ("ab", "ba")]
        futures = [threads.submit(run, pool, "meet", job, on_event=events[job["me"]].append) for job in jobs]
        answers = [future.result() for future in futures]
    assert [answer["me"] for answer in answers] == ["a", "b"]
    assert len({answer["pid"] for answer in answers}) == 1
    assert events == {"a": [{"from": "a"}], "b": [{"from": "b"}]}


def test_a_job_that_asks_for_it_has_a_process_of_its_own(tmp_path: Path) -> None:
    with WorkerPool(2, 1, one_process=True) as pool, ThreadPoolExecutor(2) as threads:
        jobs = [{"folder": str(tmp_path), "me": me, "other": other} for me, other in ("ab", "ba")]
        futures = [threads.submit(run, pool, "meet", job, alone=job["me"] == "b") for job in jobs]
        assert len({future.result()["pid"] for future in futures}) == 2


def test_all_jobs_of_a_process_that_was_killed_are_tried_again(tmp_path: Path) -> None:
    with WorkerPool(2, 1, one_process=True) as pool, ThreadPoolExecutor(2) as threads:
        jobs = [{"folder": str(tmp_path), "me": me, "other": other} for me, other in ("ab", "ba")]
        futures = [threads.submit(run, pool, "take_the_other_along", job) for job in jobs]
        assert [future.result() for future in futures] == ["a", "b"]
        assert pool.slots == 1


@pytest.mark.parametrize("words", ["DefaultCPUAllocator: can't allocate memory", "CUDA out of memory. Tried to"])
def test_a_refused_allocation_is_known_by_what_torch_says(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_a_worker_is_killed_before_its_parent_when_memory_runs_out(pool: WorkerPool) -> None:
    pid = run(pool, "double", {"x": 1})["pid"]
    badness = [int(Path(f"/proc/{name}/oom_score_adj").read_text()) for name in (pid, "self")]
    assert badness[0] == 500 > badness[1]


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
