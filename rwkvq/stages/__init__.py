"""The stages of the line, as functions of a run: what the command line, Prefect tasks and DVC all call.

A stage reads files, writes files, and never changes a file upstream.
"""

from rwkvq.stages.blocks import block_jobs, finish_quantized
from rwkvq.stages.job import run_stage_in_pool
from rwkvq.stages.line import (
    WAITS,
    adopt_plan,
    check_inputs,
    check_shared_inputs,
    clear_work,
    finish_stage,
    reason_for,
    run_line,
    run_stage,
)
from rwkvq.stages.stage import StageResult, read_seconds, save_seconds
from rwkvq.stages.table import STAGES, stages_of

__all__ = [
    "STAGES",
    "WAITS",
    "StageResult",
    "adopt_plan",
    "block_jobs",
    "check_inputs",
    "check_shared_inputs",
    "clear_work",
    "finish_quantized",
    "finish_stage",
    "read_seconds",
    "reason_for",
    "run_line",
    "run_stage",
    "run_stage_in_pool",
    "save_seconds",
    "stages_of",
]
