"""What a running family says about its cells: the only thing that a display needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EventKind = Literal["stage", "progress", "tensor", "block", "done", "failed", "kept"]


@dataclass(frozen=True, slots=True)
class CellEvent:
    """One thing that happened to the cell `cell` ("MODEL POLICY"), or to work that cells share ("MODEL shared").

    - stage: `stage` begins, or has ended after `seconds` if those are given. Stages of a cell come one after another;
      one that never begins was done elsewhere. `total` of stage quantize: tensors of the cell, if known.
    - progress: `done` of `total` units of `stage` are finished, the last one is `what`.
    - tensor: the tensor `what` is finished, with the relative output error `error` (None: not measured); `total` is the
      number of tensors of the cell, 0 if unknown. `done`, if above 0, counts those finished before, too.
    - block: the block `what` of `stage` is finished; `done` and `total` as for tensors.
    - done: the cell is finished after `seconds`. failed: it has ended with `message`.
    - kept: `stage` is valid from an earlier run; without `stage`: the whole cell is.

    Events may repeat (a job is tried again) and arrive in any order among workers.
    """

    cell: str
    kind: EventKind
    stage: str = ""
    what: str = ""
    done: int = 0
    total: int = 0
    error: float | None = None
    seconds: float | None = None
    message: str = ""
