"""Tiny artifacts: a plan that uses every format, and made-up codes for it, without running a quantizer."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvq.artifact.writer import write_artifact
from rwkvq.checkpoint.names import Weight, weights_of
from rwkvq.checkpoint.reader import Checkpoint, WeightSource, open_checkpoint
from rwkvq.checkpoint.spec import Version
from rwkvq.formats import (
    AffineCodes,
    AffineLayout,
    Codes,
    DenseLayout,
    ElementwiseCodes,
    ElementwiseLayout,
    Layout,
    ResidualCodes,
    ResidualLayout,
    RotatedCodes,
    RotatedLayout,
    ScalarCodes,
    ScalarLayout,
    ScaledCodes,
    ScaledLayout,
    TableCodes,
    TableLayout,
    TrellisCodes,
    TrellisLayout,
    VectorCodes,
    VectorLayout,
    pack_codes,
)
from rwkvq.formats.dense import DTYPES
from rwkvq.plan.options import OPTIONS_OF
from rwkvq.plan.plan import Plan, PlannedTensor
from tests.tiny import write_tiny

_OPTIONS: dict[str, Any] = {
    "damping": 0.01,
    "iterations": 100,
    "sweeps": 2,
    "weight": "second_moment",
    "percentile": 99.0,
    "act_order": False,
    "guide": 0.5,
}
PROVENANCE = {"checkpoint_name": "tiny", "settings": {"seed": 0}}


def tiny_source(folder: Path, version: Version, **sizes: Any) -> Checkpoint:
    """A random model on disk, opened."""
    return open_checkpoint(write_tiny(folder / f"{version}.safetensors", version, **sizes))


def plan_of(source: WeightSource) -> Plan:
    """A plan in which every format, and every variant of each, takes its turn."""
    shapes = {name: source.shape(name) for name in source.names()}
    # the golden models have few weights: matrices and LoRA factors begin at different formats
    tensors, turns = [], {"matrix": 0, "lora": 8, "elementwise": 0, "keep": 0}
    for weight in weights_of(source.spec, shapes):
        turn = turns[weight.weight_class]
        turns[weight.weight_class] += 1
        layout, method = _choice(source, weight, turn)
        tensors.append(_planned(weight, shapes[weight.tensor], layout, method))
    return Plan(
        model_sha256=source.identity(),
        spec=source.spec,
        policy="rwkvquant",
        preset="rwkvq",
        seed=0,
        bits=3,
        decision={"mode": "fixed"},
        thresholds={"tau_c": 1.5},
        tensors=tuple(tensors),
        dropped=(),
    )


def _planned(weight: Weight, shape: tuple[int, ...], layout: Layout, method: str) -> PlannedTensor:
    options = {name: _OPTIONS.get(name, True) for name in OPTIONS_OF[method]}
    return PlannedTensor(
        name=weight.name,
        tensor=weight.tensor,
        index=weight.index,
        transposed=weight.transposed,
        weight_class=weight.weight_class,
        block=weight.block,
        tensor_shape=shape,
        layout=layout,
        method=method,
        options=options,
        reason="test",
        proxies=None if weight.weight_class == "keep" else {"p_c": 1.0, "p_f": 2.0, "gap_mode": "unique"},
    )


def _choice(source: WeightSource, weight: Weight, turn: int) -> tuple[Layout, str]:
    own = next(name for name, dtype in DTYPES.items() if dtype == source.dtype(weight.tensor))
    if weight.weight_class == "keep":
        return DenseLayout(weight.shape, own), "keep"
    if weight.weight_class == "elementwise":
        (size,) = weight.shape
        choices: list[tuple[Layout, str]] = [
            (ElementwiseLayout(size, 8, 64), "elementwise"),
            (ScalarLayout(1, size, 3, 64, False), "rtn"),
            (DenseLayout(weight.shape, "float16"), "keep"),
            (ElementwiseLayout(size, 5, 48), "elementwise"),
        ]
        return choices[turn % len(choices)]
    rows, columns = weight.shape
    choices = [
        (ScalarLayout(rows, columns, 3, math.gcd(columns, 64), False), "gptq"),
        (VectorLayout(rows, columns, 2, 64, 32, math.gcd(columns, 64), 8, None), "gptvq"),
        (ScalarLayout(rows, columns, 4, math.gcd(columns, 32), True), "rtn"),
        (VectorLayout(rows, columns, 1, 8, 2, math.gcd(columns, 32), 8, 4), "gptvq"),
        (VectorLayout(rows, columns, 4, 512, 40, math.gcd(columns, 64), 16, None), "kmeans"),
        (ScalarLayout(rows, columns, 8, columns, False), "rtn"),
        (ScalarLayout(rows, columns, 2, math.gcd(columns, 64), True), "gptq"),
        (_trellis_layout(rows, columns, turn), "trellis"),
        (TableLayout(rows, columns, 2 + turn % 3), "table"),
        (ScaledLayout(ScalarLayout(rows, columns, 3, math.gcd(columns, 32), False)), "awq"),
        (RotatedLayout(ScalarLayout(rows, columns, 3, math.gcd(columns, 64), True)), "rotation"),
        (AffineLayout(rows, columns, 3, math.gcd(columns, 64)), "hqq"),
        (ResidualLayout(rows, columns, 4, 64, 8), "residual"),
        (DenseLayout(weight.shape, own), "keep"),
    ]
    return choices[turn % len(choices)]


def _trellis_layout(rows: int, columns: int, turn: int) -> TrellisLayout:
    """A layout with and without offsets of rows and columns."""
    length = math.gcd(rows, 32)
    offset_bits = (turn % 3 and 2 + turn % 3, 3 if length == 32 and turn % 2 else 0)
    return TrellisLayout(rows, columns, 12 if turn % 2 else 8, 8, length, *offset_bits)


def trellis_offsets(layout: TrellisLayout, key: str) -> tuple[Tensor, Tensor]:
    """Valid offsets int8 of rows and columns: -2 ... 2 and their opposites, 0 in the middle of an odd number."""

    def offsets(name: str, bits: int, count: int) -> Tensor:
        half = scattered(f"{key}{name}", -2, 3, (count // 2,), torch.int8) if bits else torch.zeros(count // 2)
        half[:1] = 2 if bits else 0
        return torch.cat([half, torch.zeros(count % 2), -half]).to(torch.int8)

    sequences = [offsets(f"row{part}", layout.row_offset_bits, layout.length) for part in range(layout.sequences)]
    return torch.cat(sequences), offsets("column", layout.column_offset_bits, layout.columns)


def codes_of(plan: Plan, seed: int = 0) -> dict[str, Codes]:
    """Valid codes of every weight that is not kept, by integer arithmetic: the same on every machine and torch."""
    return {item.name: _codes(item.layout, f"{seed} {item.name}") for item in plan.tensors if item.method != "keep"}


def scattered(key: str, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    """Whole numbers in low .. high - 1 that look random and depend on `key` and position alone."""
    index = torch.arange(math.prod(shape), dtype=torch.int64) + zlib.crc32(key.encode())
    mixed = ((index * 2654435761) & 0xFFFFFFFF) ^ (index >> 3)
    return (low + (mixed >> 8) % (high - low)).to(dtype).reshape(shape)


def _scalar_codes(layout: ScalarLayout, key: str) -> ScalarCodes:
    levels, groups = 1 << layout.bits, (layout.rows, layout.groups)
    zero = None if layout.symmetric else scattered(f"{key}zero", 0, levels, groups, torch.uint8)
    codes = scattered(key, 0, levels, (layout.rows, layout.columns), torch.uint8)
    scale = scattered(f"{key}scale", 1, 32, groups) * 2.0**-10
    return ScalarCodes(layout, codes, scale.half(), zero)


def _codes(layout: Layout, key: str) -> Codes:
    """Scales, bases and float codebooks are multiples of a power of two, so that decoding is exact."""
    parts = {name: shape for name, (_, shape) in layout.parts().items()}

    def halves(part: str, low: int, high: int, unit: float) -> Tensor | None:
        return (scattered(key + part, low, high, parts[part]) * unit).half() if part in parts else None

    if isinstance(layout, ScalarLayout):
        return _scalar_codes(layout, key)
    if isinstance(layout, ScaledLayout):
        column_scale = 2.0 ** scattered(f"{key}column_scale", -3, 4, (layout.columns,))
        return ScaledCodes(layout, _scalar_codes(layout.inner, key), column_scale.half())
    if isinstance(layout, RotatedLayout):
        flips = scattered(f"{key}flips", 0, 2, (layout.columns,), torch.uint8)
        return RotatedCodes(layout, _scalar_codes(layout.inner, key), flips)
    if isinstance(layout, AffineLayout):
        codes = scattered(key, 0, 1 << layout.bits, (layout.rows, layout.columns), torch.uint8)
        scale, offset = halves("scale", 1, 32, 2**-10), halves("zero", -64, 65, 2**-3)
        assert scale is not None and offset is not None
        return AffineCodes(layout, codes, scale, offset)
    if isinstance(layout, ResidualLayout):
        main = halves("codebook", -512, 513, 2**-8)
        residual = halves("residual_codebook", -128, 129, 2**-9)
        assert main is not None and residual is not None
        places = (layout.row_groups, layout.columns)
        found = scattered(key, 0, layout.entries, places, torch.int16)
        others = scattered(f"{key}residual", 0, layout.residual_entries, places, torch.int16)
        return ResidualCodes(layout, found, others, main, residual)
    if isinstance(layout, TableLayout):
        base = halves("base", 1, 32, 2**-10)
        assert base is not None
        return TableCodes(
            layout,
            scattered(key, 0, layout.entries, (layout.rows, layout.columns), torch.uint8),
            scattered(f"{key}selector", 0, 16, (layout.rows, layout.groups), torch.uint8),
            scattered(f"{key}table", -127, 128, parts["table"], torch.int8),
            8 * scattered(f"{key}scale", 0, 8, (layout.rows,), torch.uint8),
            base,
        )
    if isinstance(layout, TrellisLayout):
        codes = scattered(key, 0, 256, parts["codes"], torch.uint8)
        base = halves("base", 1, 32, 2**-10)
        assert base is not None
        # whole octaves, so that scales are powers of two
        scale = 8 * scattered(f"{key}scale", 0, 8, (layout.rows,), torch.uint8)
        return TrellisCodes(layout, codes, *trellis_offsets(layout, key), scale, base)
    scale = halves("scale", 1, 32, 2**-12)
    if isinstance(layout, VectorLayout):
        codes = scattered(key, 0, layout.entries, (layout.rows, layout.columns // layout.dimension), layout.code_dtype)
        codebook = halves("codebook", -512, 513, 2**-8)
        if layout.codebook_bits == 8 or codebook is None:
            codebook = scattered(f"{key}codebook", -127, 128, parts["codebook"], torch.int8)
        return VectorCodes(layout, codes, codebook, scale, halves("basis", -64, 65, 2**-6))
    assert isinstance(layout, ElementwiseLayout) and scale is not None, layout
    codes = scattered(key, 0, layout.entries, (layout.size,), torch.uint8)
    return ElementwiseCodes(layout, codes, scattered(f"{key}codebook", -127, 128, parts["codebook"], torch.int8), scale)


def errors_of(plan: Plan) -> dict[str, dict[str, float | None]]:
    """Made-up figures for every weight that is not kept."""
    return {item.name: {"weight_error": 0.03, "output_error": None} for item in plan.tensors if item.method != "keep"}


def write_packed(
    out: Path, source: WeightSource, plan: Plan, codes: Mapping[str, Codes], *, overwrite: bool = False, **options: Any
) -> Path:
    """Write the artifact of `codes`; returns `out`."""
    arguments: dict[str, Any] = {"tokenizer": None, "provenance": PROVENANCE} | options
    parts = {name: pack_codes(code) for name, code in codes.items()}
    write_artifact(
        out, source, plan, lambda planned: parts[planned.name], errors_of(plan), overwrite=overwrite, **arguments
    )
    return out
