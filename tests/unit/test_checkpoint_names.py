"""Names, classes, orientation and sites of every weight."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rwkvq.checkpoint.names import UNUSED, assemble, expected_shapes, extract, unused_tensors, weights_of
from rwkvq.checkpoint.spec import Version
from tests.tiny import tiny_spec, tiny_tensors

# docs/method.md 1: matrices and LoRA factors a block, element-wise vectors a block
COUNTS = {"x060": (16, 8), "x070": (14, 10)}


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_counts_are_those_of_the_method(version: Version) -> None:
    spec = tiny_spec(version, layers=3)
    weights = weights_of(spec, expected_shapes(spec))
    classes = Counter((weight.block, weight.weight_class) for weight in weights)
    quantized, elementwise = COUNTS[version]
    for block in range(3):
        without_value_path = 2 if version == "x070" and block == 0 else 0
        assert classes[block, "matrix"] + classes[block, "lora"] == quantized - without_value_path
        assert classes[block, "elementwise"] == elementwise
    assert len({weight.name for weight in weights}) == len(weights)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_every_tensor_is_covered_exactly(version: Version) -> None:
    spec = tiny_spec(version)
    tensors = tiny_tensors(version)
    weights = weights_of(spec, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert list(dict.fromkeys(weight.tensor for weight in weights)) == list(tensors)
    for name, tensor in tensors.items():
        mine = [weight for weight in weights if weight.tensor == name]
        parts = {weight.name: extract(tensor, weight) for weight in mine}
        assert all(part.shape == weight.shape for part, weight in zip(parts.values(), mine, strict=True))
        assert all(part.is_contiguous() and part.dtype == tensor.dtype for part in parts.values())
        assert torch.equal(assemble(parts, mine, tuple(tensor.shape)), tensor)


def test_slices_of_time_maa_w2_are_matrices_out_by_in() -> None:
    spec = tiny_spec("x060")
    weights = {weight.name: weight for weight in weights_of(spec, expected_shapes(spec))}
    tensor = torch.randn(5, 16, 128)
    weight = weights["blocks.1.att.time_maa_w2.v"]
    assert (weight.index, weight.shape, weight.site) == (2, (128, 16), "maa_rank_v")
    assert torch.equal(extract(tensor, weight), tensor[2].T)


@pytest.mark.parametrize(
    ("version", "name", "weight_class", "site", "shape"),
    [
        ("x070", "att.v1", "lora", "xv", (16, 128)),
        ("x070", "att.g2", "lora", "g_rank", (128, 48)),
        ("x070", "att.r_k", "elementwise", "r_times_k", (128,)),
        ("x070", "att.w0", "keep", None, (128,)),
        ("x070", "ffn.value.weight", "matrix", "ffn_value", (128, 256)),
        ("x060", "att.time_decay_w1", "lora", "xw", (32, 128)),
        ("x060", "att.time_maa_w1", "lora", "maa_z", (80, 128)),
        ("x060", "ffn.receptance.weight", "matrix", "ffn_receptance", (128, 128)),
        ("x060", "att.time_faaaa", "keep", None, (2, 64)),
    ],
)
def test_rows_of_the_table(
    version: Version, name: str, weight_class: str, site: str | None, shape: tuple[int, ...]
) -> None:
    spec = tiny_spec(version)
    weight = next(w for w in weights_of(spec, expected_shapes(spec)) if w.name == f"blocks.1.{name}")
    assert (weight.weight_class, weight.site, weight.shape, weight.block) == (weight_class, site, shape, 1)


def test_order_is_embedding_blocks_head() -> None:
    spec = tiny_spec("x070", layers=11)
    blocks = [weight.block for weight in weights_of(spec, expected_shapes(spec))]
    assert blocks[0] is None and blocks[-3:] == [None] * 3
    assert blocks[1:-3] == sorted(block for block in blocks if block is not None)


def test_unused_tensors_belong_to_block_0_of_x070() -> None:
    names = [*UNUSED[:2], "blocks.1.att.v0", "emb.weight"]
    assert unused_tensors(tiny_spec("x070"), names) == list(UNUSED[:2])
    assert unused_tensors(tiny_spec("x060"), names) == []
    assert not set(UNUSED) & set(expected_shapes(tiny_spec("x070")))
