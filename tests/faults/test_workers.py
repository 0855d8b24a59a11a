"""Worker processes that die, starve or hang under the flow."""

from __future__ import annotations

import signal

import pytest

from tests.faults.flow import TENSOR, Flow

pytestmark = pytest.mark.slow
TWO = "run.workers=2"


def test_a_worker_that_runs_out_of_memory_is_followed_by_fewer(flow: Flow) -> None:
    flow.prepare("quantize")
    command = flow.paused(TENSOR, TWO)
    assert len(command.workers()) == 2
    kept = flow.tensors()
    command.waiting().kill()
    command.resume()
    command.wait_for("killed by signal 9, as the system does when memory runs out; going on with 1 of 2 workers")
    assert len(command.workers()) == 1, command.log()
    command.finish()
    flow.assert_same(kept)


def test_a_refused_allocation_is_tried_again_by_fewer_workers(flow: Flow) -> None:
    flow.prepare("quantize")
    log = flow.start(TWO, at=TENSOR, fault="starve").finish()
    (line,) = [line for line in log.splitlines() if "not enough memory" in line]
    assert "block-000: worker" in line and line.endswith("going on with 1 of 2 workers")
    flow.assert_same()


def test_memory_that_never_suffices_ends_the_flow_in_one_line(flow: Flow) -> None:
    flow.prepare("quantize")
    overrides = "run.workers=1", "run.retries=0"
    flow.start(*overrides, at=TENSOR, fault="starve").fail("block-000", "with one worker left", "free some memory")
    kept = flow.tensors()
    flow.start(*overrides).finish()
    flow.assert_same(kept)


def test_a_stage_killed_for_memory_is_tried_again(flow: Flow) -> None:
    flow.prepare("pack")
    command = flow.paused("/model.safetensors", TWO)
    command.waiting().kill()
    command.resume()
    assert "going on with 1 of 2 workers" in command.finish()
    flow.assert_same()


def test_a_crashed_worker_is_replaced_and_the_others_stay(flow: Flow) -> None:
    flow.prepare("quantize")
    command = flow.paused(TENSOR, TWO)
    kept = flow.tensors()
    command.waiting().send_signal(signal.SIGSEGV)
    command.resume()
    log = command.finish()
    assert "Retry 1/1" in log and "workers;" not in log and "going on with" not in log
    flow.assert_same(kept)


@pytest.mark.parametrize(("stage", "file"), [("activations", "activations/block-001.parquet"), ("quantize", TENSOR)])
def test_a_worker_that_hangs_is_stopped_at_the_time_limit(flow: Flow, stage: str, file: str) -> None:
    flow.prepare(stage)
    command = flow.paused(file, "run.task_timeout=15")
    command.waiting().send_signal(signal.SIGSTOP)
    command.fail("still running after 15 s and stopped; raise run.task_timeout", file.partition("/")[0])
    kept = flow.tensors()
    flow.start().finish()
    flow.assert_same(kept)
