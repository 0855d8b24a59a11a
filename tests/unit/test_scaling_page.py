"""The page of the scaling benchmark, from measurements that can be checked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.scaling_page import RELEASED_VOCAB, costs_of, machines_of, page

STAGES = {
    "windows": 1.0,
    "activations": 20.0,
    "proxies": 6.0,
    "plan": 0.0,
    "pack": 1.0,
    "evaluate": 30.0,
    "report": 1.0,
}


@pytest.fixture
def found() -> dict[str, Any]:
    def line(workers: int) -> dict[str, Any]:
        stages = STAGES | {"quantize": 60.0 / workers}
        return {"workers": workers, "wall": 10 + sum(stages.values()), "stages": stages, "hash": "same"}

    return {
        "cores": 2,
        "dispatch": 0.01,
        "windows": 136,
        "model": {"name": "model", "layers": 6, "width": 256, "vocab": 8192},
        "quantize": [{"workers": w, "wall": 60.0 / w, "jobs": [10.0] * 6, "hash": "same"} for w in (1, 2)],
        "line": [line(1), line(2)],
        "policies": {"rtn": [0.5] * 6, "sq": [3.0] * 6, "rwkvquant": [10.0] * 6},
    }


def test_the_simulator_is_held_against_the_measurement(found: dict[str, Any]) -> None:
    shown = page(found)
    assert "| quantize | 2 | 30.0 | 30.0 | +0 % |" in shown
    assert "| 1 | 60.0 | 30.0 | 2.00 |" in shown


def test_different_bytes_are_said(found: dict[str, Any]) -> None:
    assert "DIFFERENT" not in page(found)
    found["line"][1]["hash"] = "other"
    assert "Bytes of all runs: DIFFERENT." in page(found)


def test_costs_grow_with_the_weights(found: dict[str, Any]) -> None:
    costs = costs_of(found)
    assert costs.block("rwkvquant", 512) == 4 * costs.block("rwkvquant", 256) == 40
    assert costs.stage("activations", 12, 512, RELEASED_VOCAB) == 8 * 20
    assert costs.stage("windows", 12, 512, RELEASED_VOCAB) == 1


def test_workers_are_spread_over_machines() -> None:
    assert machines_of(8) == [8] and machines_of(64) == [16] * 4
