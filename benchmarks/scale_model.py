"""Models of a released shape with random values, written tensor by tensor, and what a run needs beside them."""

from __future__ import annotations

import math
import os
import random
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rwkvq.calibration.statistics import SecondMoment
from rwkvq.checkpoint.names import expected_shapes
from rwkvq.checkpoint.spec import ModelSpec, Version
from rwkvq.checkpoint.writer import write_safetensors
from rwkvq.files import write_json, write_text
from rwkvq.formats import Layout, ScalarLayout, TrellisLayout, VectorLayout
from rwkvq.plan.plan import PlannedTensor
from rwkvq.quantize.block import quantize_tensor
from rwkvq.quantize.inputs import Inputs

HEAD_SIZE = 64
_CENTERS = {"time_decay": (-2.0, 1.5), "w0": (0.0, 1.5), "a0": (0.0, 0.5), "v0": (0.0, 0.5), "k_k": (0.85, 0.2)}
"""Mean and spread of vectors that are not mixing ratios."""


def spec_of_shape(version: Version, *, layers: int, width: int, ffn: int, vocab: int) -> ModelSpec:
    """Sizes of a model; low ranks as in the released models of the width."""
    if version == "x060":
        ranks = {"mix": 64, "decay": 128} if width >= 4096 else {"mix": 32, "decay": 64}
    elif width >= 4096:
        ranks = {"w": 192, "a": 192, "v": 128, "g": 384}
    else:
        ranks = {"w": 64, "a": 64, "v": 32, "g": 128}
    return ModelSpec(version, layers, width, width // HEAD_SIZE, HEAD_SIZE, ffn, vocab, ranks)


def block_bytes(spec: ModelSpec) -> int:
    """Bytes of the largest block in float32."""
    sizes: dict[str, int] = {}
    for name, shape in expected_shapes(spec).items():
        if name.startswith("blocks."):
            block = name.split(".")[1]
            sizes[block] = sizes.get(block, 0) + 4 * math.prod(shape)
    return max(sizes.values())


def values_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random bfloat16 values that keep activations near 1; the same for the same name and shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    short = name.rsplit(".", 1)[-1]
    if short == "bias" or (short == "weight" and len(shape) == 1):
        center, spread = float(short == "weight"), 0.1
    elif len(shape) == 1:
        center, spread = _CENTERS.get(short, (0.5, 0.25))
    elif short in ("r_k", "time_faaaa"):
        center, spread = 0.0, 0.3
    else:
        fan_in = 1 if name == "emb.weight" else shape[-1] if short == "weight" else shape[-2]
        center, spread = 0.0, fan_in**-0.5
    result = torch.empty(shape, dtype=torch.bfloat16)
    flat = result.view(-1)
    for part in torch.split(flat, 1 << 22):
        part.copy_(torch.randn(len(part), generator=generator).mul_(spread).add_(center))
    return result


def write_model(folder: Path, spec: ModelSpec, suffix: str) -> Path:
    """Write the model unless it is there: one shard a block, one .safetensors, or a .pth (held in memory)."""
    shapes = expected_shapes(spec)
    folder.mkdir(parents=True, exist_ok=True)
    if suffix != "shards":
        path = folder / f"model{suffix}"
        if not path.is_file() and suffix == ".safetensors":
            _write_file(path, shapes)
        elif not path.is_file():
            torch.save({name: values_of(name, shape) for name, shape in shapes.items()}, path)
        return path
    model = folder / "model"
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        shards.setdefault(name.split(".")[1] if name.startswith("blocks.") else "outer", {})[name] = shape
    model.mkdir(exist_ok=True)
    files = {model / f"part-{key}.safetensors": part for key, part in shards.items()}
    missing = {path: part for path, part in files.items() if not path.is_file()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_write_file, missing, missing.values()))
    index = {name: path.name for path, part in files.items() for name in part}
    write_json(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return model


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    entries = [(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    write_safetensors(path, entries, _tensors(shapes), {"format": "pt"})


def _tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        yield name, values_of(name, shape)


@dataclass(frozen=True, slots=True)
class Texts:
    """Files of a run beside the model."""

    tokenizer: Path
    calibration: Path
    validation: Path


def write_texts(folder: Path, tokens: int) -> Texts:
    """Write a vocabulary of single bytes and two texts of random letters, some times `tokens` bytes long."""
    texts = Texts(folder / "bytes.txt", folder / "calibration.txt", folder / "validation.txt")
    write_text(texts.tokenizer, "".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    for seed, path in enumerate((texts.calibration, texts.validation)):
        chooser = random.Random(seed)
        write_text(path, "".join(chooser.choices("abcdefghijklmnopqrstuvwxyz     ", k=4 * tokens + 4096)))
    return texts


def quantize_one(rows: int, columns: int, method: Literal["gptq", "gptvq", "trellis"], sweeps: int) -> None:
    """Quantize a random weight [rows, columns] with the second moment of squared relu inputs, 3 bits."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    accumulator = SecondMoment(columns)
    for _ in range(4):
        accumulator.add(torch.randn(1, 512, columns, generator=generator).relu_().square_())
    moment = accumulator.finish()
    del accumulator  # its sums are as large as the moment
    weight = torch.randn(rows, columns, generator=generator).mul_(columns**-0.5)
    if method == "gptq":
        layout: Layout = ScalarLayout(rows, columns, 3, 64, True)
        options: dict[str, Any] = {"clip_search": True, "sweeps": sweeps}
    elif method == "trellis":
        layout, options = TrellisLayout(rows, columns, 13, 12, 256, 3, 3), {"sweeps": sweeps}
    else:
        layout = VectorLayout(rows, columns, 2, 64, 256, 128, 8, None)
        options = {"sweeps": sweeps}
    name = "blocks.0.ffn.value.weight"
    shape = (rows, columns)
    entry = PlannedTensor(name, name, None, False, "matrix", 0, shape, layout, method, options, "measured", None)
    quantize_tensor(weight, entry, Inputs({name: moment}, {}, {name: torch.ones(rows)}, {}))
