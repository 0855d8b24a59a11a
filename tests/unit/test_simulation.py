"""The simulator of the scaling benchmark, on cases that can be counted by hand."""

from __future__ import annotations

import pytest

from benchmarks.simulation import Task, simulate, work_of


def independent(*seconds: float) -> list[Task]:
    return [Task(str(index), value) for index, value in enumerate(seconds)]


def test_one_worker_does_everything_in_turn() -> None:
    assert simulate(work_of(independent(3, 1, 2)), [1]) == 6


def test_the_longest_goes_first() -> None:
    assert simulate(work_of(independent(1, 1, 2, 4)), [2]) == 4


def test_more_workers_than_tasks_end_with_the_longest() -> None:
    work = work_of(independent(1, 5, 2))
    assert simulate(work, [8]) == work.critical_path(8) == 5


def test_a_chain_gains_nothing() -> None:
    chain = [Task("a", 2), Task("b", 3, ("a",)), Task("c", 4, ("b",))]
    assert simulate(work_of(chain), [4]) == 9


def test_the_longest_path_counts_and_not_the_longest_task() -> None:
    tasks = [Task("short", 1), Task("behind", 9, ("short",)), Task("long", 5), Task("other", 5)]
    assert simulate(work_of(tasks), [2]) == 10


def test_a_stage_uses_the_cores_of_one_machine() -> None:
    stage = [Task("stage", 12, cores=4)]
    assert simulate(work_of(stage), [2, 2]) == 6
    assert simulate(work_of(stage), [4]) == simulate(work_of(stage), [8]) == 3


def test_a_stage_is_not_starved_by_small_tasks() -> None:
    small = [Task(f"small {index}", 1.0) for index in range(20)]
    stage = [Task("stage", 8, cores=2), Task("end", 10, ("stage",))]
    assert simulate(work_of([*small, Task("first", 0.5), *stage]), [2]) == 19.5


def test_the_scheduler_hands_out_one_task_at_a_time() -> None:
    assert simulate(work_of(independent(*[1.0] * 4)), [4], dispatch=0.5) == 3.0


def test_tasks_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="waits for a"):
        work_of([Task("b", 1, ("a",)), Task("a", 1)])
