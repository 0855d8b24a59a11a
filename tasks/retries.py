"""When a failed task is tried again."""

from __future__ import annotations

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

from rwkvq.errors import OutOfMemory, RwkvqError, StoredObjectError, StoreError
from rwkvq.workers import WorkerDied


async def is_transient(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """True unless the input or the time limit is at fault: those come back however often the task runs."""
    try:
        await state.aresult()
    except StoredObjectError:
        return False  # the flow has to send it again
    except (WorkerDied, StoreError, OutOfMemory):
        return True
    except (RwkvqError, TimeoutError):
        return False
    except Exception:
        return True
    return True
