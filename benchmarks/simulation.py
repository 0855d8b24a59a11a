"""A discrete-event simulation of tasks on machines: list scheduling, the longest remaining path first."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Task:
    """Work of `seconds` on one core, which can use up to `cores` cores of one machine; `after`: names it waits for."""

    name: str
    seconds: float
    after: tuple[str, ...] = ()
    cores: int = 1


@dataclass(frozen=True)
class Work:
    """Tasks by name, each after those that it waits for."""

    tasks: Mapping[str, Task]

    @cached_property
    def total(self) -> float:
        """Core seconds of all tasks."""
        return sum(task.seconds for task in self.tasks.values())

    @cached_property
    def followers(self) -> dict[str, list[str]]:
        """Names of the tasks that wait for each task."""
        found: dict[str, list[str]] = {name: [] for name in self.tasks}
        for task in self.tasks.values():
            for name in task.after:
                found[name].append(task.name)
        return found

    def remaining(self, cores: int) -> dict[str, float]:
        """Seconds from the begin of each task to the end of the longest path behind it, on machines of `cores`."""
        path: dict[str, float] = {}
        for task in reversed(list(self.tasks.values())):
            behind = max((path[name] for name in self.followers[task.name]), default=0.0)
            path[task.name] = behind + task.seconds / min(task.cores, cores)
        return path

    def critical_path(self, cores: int) -> float:
        """Seconds that no number of machines of `cores` can go below."""
        return max(self.remaining(cores).values())


def work_of(tasks: Sequence[Task]) -> Work:
    """`tasks` as Work; raises ValueError unless each comes after those that it waits for."""
    known: dict[str, Task] = {}
    for task in tasks:
        if missing := [name for name in task.after if name not in known]:
            raise ValueError(f"{task.name} waits for {missing[0]}, which does not come before it")
        known[task.name] = task
    return Work(known)


def simulate(work: Work, machines: Sequence[int], dispatch: float = 0.0) -> float:
    """Seconds until all is done on machines of so many cores each.

    One scheduler hands out task after task, `dispatch` seconds each. A task that needs more cores than are free on any
    machine holds back the freest one until they are.
    """
    free, path = list(machines), work.remaining(max(machines))
    waiting = {name: len(task.after) for name, task in work.tasks.items()}
    ready = sorted((name for name, count in waiting.items() if not count), key=lambda name: -path[name])
    running: list[tuple[float, str, int, int]] = []  # (end, name, machine, cores)
    now = scheduler = 0.0
    while ready or running:
        held: set[int] = set()
        for name in list(ready):
            place = _place(work.tasks[name], free, machines, held)
            if place is None:
                continue
            machine, cores = place
            free[machine] -= cores
            ready.remove(name)
            scheduler = max(now, scheduler) + dispatch
            heapq.heappush(running, (scheduler + work.tasks[name].seconds / cores, name, machine, cores))
        now, name, machine, cores = heapq.heappop(running)
        free[machine] += cores
        for follower in work.followers[name]:
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)
        ready.sort(key=lambda name: -path[name])
    return now


def _place(task: Task, free: Sequence[int], machines: Sequence[int], held: set[int]) -> tuple[int, int] | None:
    """(machine, cores) for a task; None if it has to wait, and then the freest machine joins `held` for this round."""
    open_machines = [index for index in range(len(free)) if index not in held and free[index]]
    if not open_machines:
        return None
    machine = max(open_machines, key=lambda index: free[index])
    cores = min(task.cores, machines[machine])
    if free[machine] >= cores:
        return machine, cores
    held.add(machine)
    return None
