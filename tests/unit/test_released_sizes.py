"""The table of tensors gives the parameter counts of the released models, which their files' sizes confirm."""

from __future__ import annotations

import math

import pytest

from rwkvq.checkpoint.names import expected_shapes
from rwkvq.checkpoint.spec import ModelSpec, Version

VOCAB = 65_536
RELEASED: list[tuple[Version, int, int, int, dict[str, int], int]] = [
    ("x060", 24, 2048, 7168, {"mix": 32, "decay": 64}, 1_599_873_024),
    ("x060", 32, 2560, 8960, {"mix": 32, "decay": 64}, 3_099_863_040),
    ("x060", 32, 4096, 14336, {"mix": 64, "decay": 128}, 7_635_746_816),
    ("x060", 61, 4096, 14336, {"mix": 64, "decay": 128}, 14_069_088_256),
    ("x070", 12, 768, 3072, {"w": 64, "a": 64, "v": 32, "g": 128}, 191_034_624),
    ("x070", 24, 1024, 4096, {"w": 64, "a": 64, "v": 32, "g": 128}, 450_767_872),
    ("x070", 24, 2048, 8192, {"w": 96, "a": 96, "v": 64, "g": 256}, 1_527_404_544),
    ("x070", 32, 2560, 10240, {"w": 96, "a": 96, "v": 64, "g": 320}, 2_947_735_040),
    ("x070", 32, 4096, 16384, {"w": 128, "a": 128, "v": 96, "g": 480}, 7_199_141_888),
    ("x070", 61, 4096, 16384, {"w": 192, "a": 192, "v": 128, "g": 384}, 13_269_245_952),
]


@pytest.mark.parametrize(("version", "layers", "width", "ffn", "ranks", "parameters"), RELEASED)
def test_parameters_of_released_models(
    version: Version, layers: int, width: int, ffn: int, ranks: dict[str, int], parameters: int
) -> None:
    spec = ModelSpec(version, layers, width, width // 64, 64, ffn, VOCAB, ranks)
    assert sum(math.prod(shape) for shape in expected_shapes(spec).values()) == parameters
