"""Files that are damaged while the flow runs, or that a loss of power left empty."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.flow import TENSOR, Flow
from tests.small import tree_hash

pytestmark = pytest.mark.slow


def damage(path: Path, how: str) -> None:
    """Do one of the things that disks do."""
    if how == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    elif how == "vanished":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if how == "truncated" else 0)


@pytest.mark.parametrize("how", ["flipped", "truncated", "vanished"])
def test_a_damaged_file_of_the_activation_cache_is_built_again(flow: Flow, how: str) -> None:
    flow.prepare("quantize")
    command = flow.paused(TENSOR, "run.workers=1")
    kept, damaged = flow.tensors(), flow.run.activations / "block-001.parquet"
    damage(damaged, how)
    command.resume()
    log = command.finish()
    assert log.count(f"{damaged}: damaged, no longer what stage activations wrote; building it again") == 1
    flow.assert_same(kept)
    assert tree_hash(flow.run.activations) == tree_hash(flow.undisturbed[0] / "run" / "activations")


@pytest.mark.parametrize("how", ["flipped", "empty"])
def test_a_quantized_tensor_damaged_before_pack_is_quantized_again(flow: Flow, how: str) -> None:
    flow.prepare("quantize")
    command = flow.paused("manifests/quantize.json")
    damaged, kept = flow.run.quantized / TENSOR, flow.tensors()
    del kept[damaged]
    damage(damaged, how)
    command.resume()
    log = command.finish()
    assert log.count(f"{damaged}: damaged, no longer what stage quantize wrote; quantizing it again") == 1
    flow.assert_same(kept)


@pytest.mark.parametrize("content", ["", "\x00garbage"])
def test_a_manifest_that_says_nothing_costs_its_stage_only(flow: Flow, content: str) -> None:
    flow.prepare("pack")
    kept = flow.tensors()
    (flow.run.folder / "manifests" / "quantize.json").write_text(content)
    log = flow.start().finish()
    assert "quantize: manifest unreadable" in log and "plan: up to date" in log
    flow.assert_same(kept)


def test_tensors_that_a_loss_of_power_left_empty_are_quantized_again(flow: Flow) -> None:
    flow.prepare("pack")
    (flow.run.folder / "manifests" / "quantize.json").unlink()
    tensors = sorted(flow.tensors())
    for path in tensors[::3]:
        damage(path, "empty")
    kept = {path: time for path, time in flow.tensors().items() if path not in tensors[::3]}
    flow.start().finish()
    flow.assert_same(kept)


@pytest.mark.parametrize("owner", ["windows", "proxies"])
def test_a_small_result_damaged_before_it_is_read_is_made_again(flow: Flow, owner: str) -> None:
    flow.prepare(owner)
    command = flow.paused(f"manifests/{owner}.json")
    damaged = flow.run.folder / f"{owner}.parquet"
    damage(damaged, "flipped")
    command.resume()
    assert f"{damaged}: damaged, no longer what stage {owner} wrote; building it again" in command.finish()
    flow.assert_same()


def test_a_damaged_plan_is_left_to_the_user(flow: Flow) -> None:
    flow.prepare("quantize")
    damage(flow.run.plan, "truncated")
    size = flow.run.plan.stat().st_size
    flow.start().fail(flow.run.plan)
    assert flow.run.plan.stat().st_size == size
    flow.run.plan.unlink()
    flow.start().finish()
    flow.assert_same()
