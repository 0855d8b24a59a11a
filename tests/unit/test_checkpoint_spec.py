"""Version and sizes come from the tensors."""

from __future__ import annotations

import json

import pytest

from rwkvq.checkpoint.names import expected_shapes
from rwkvq.checkpoint.spec import ModelSpec, Version, count_blocks, spec_of
from rwkvq.errors import CheckpointError
from tests.tiny import tiny_spec


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_spec_is_read_back_from_the_shapes_it_demands(version: Version) -> None:
    spec = tiny_spec(version, layers=3, width=192, ffn=352, vocab=77)
    assert spec_of(expected_shapes(spec)) == spec


def test_one_block_of_x070_has_no_value_path() -> None:
    spec = tiny_spec("x070", layers=1)
    assert spec_of(expected_shapes(spec)).lora_ranks["v"] == 0


def test_size_is_what_most_blocks_say() -> None:
    spec = tiny_spec("x070", layers=3)
    shapes = expected_shapes(spec)
    shapes["blocks.0.ffn.key.weight"] = (7, spec.width)
    assert spec_of(shapes).ffn == spec.ffn


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_json_round_trip(version: Version) -> None:
    spec = tiny_spec(version)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("key", "value"),
    [("version", "x052"), ("layers", 0), ("width", "128"), ("heads", 3), ("vocab", True), ("lora_ranks", {"w": 1})],
)
def test_json_with_a_wrong_value_is_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"model description"):
        ModelSpec.from_json(tiny_spec("x070").to_json() | {key: value})


def test_json_of_another_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no version"):
        ModelSpec.from_json(["x070"])


def test_absent_block_is_named_without_counting_up_to_it() -> None:
    with pytest.raises(CheckpointError, match="block 1 has no tensors although block 999999 has"):
        count_blocks({"blocks.0.ln1.weight": (1,), "blocks.999999.ln1.weight": (1,)})


def test_no_blocks() -> None:
    with pytest.raises(CheckpointError, match=r"no tensor named blocks\.N"):
        count_blocks({"emb.weight": (1, 1)})


def test_size_that_cannot_be_read_names_its_tensor() -> None:
    shapes = expected_shapes(tiny_spec("x060"))
    for block in (0, 1):
        del shapes[f"blocks.{block}.att.time_decay_w1"]
    with pytest.raises(CheckpointError, match="time_decay_w1"):
        spec_of(shapes)
