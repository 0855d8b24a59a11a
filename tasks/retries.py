"""When a failed task is tried again."""

from __future__ import annotations

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

from rwkvq.errors import RwkvqError
from rwkvq.workers import WorkerDied


async def is_transient(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """True unless the input or the time limit is at fault: those come back however often the task runs."""
    try:
        await state.aresult()
    except WorkerDied:
        return True
    except (RwkvqError, TimeoutError):
        return False
    except Exception:
        return True
    return True
