"""The layout of one weight in each arm: which group fits its shape, and why it differs from the settings if it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from rwkvq.checkpoint.names import Weight
from rwkvq.errors import PlanError, ShapeError
from rwkvq.formats import (
    AffineLayout,
    DenseLayout,
    ElementwiseLayout,
    Layout,
    ResidualLayout,
    RotatedLayout,
    ScalarLayout,
    ScaledLayout,
    VectorLayout,
)
from rwkvq.formats.dense import DTYPES, DenseDtype
from rwkvq.formats.vector import MAX_ENTRIES
from rwkvq.plan.options import Method
from rwkvq.plan.presets import Resolved, VectorArm

SMALLEST_GROUP = 16
"""A LoRA factor is not cut into groups of fewer columns: their scales would cost more than a bit per weight."""

MAIN_BITS = 12
"""The largest main codebook of policy `residual` has 4096 entries: larger ones take k-means too long."""

RESIDUAL_SPARE = 0.27
"""Bits a weight that policy `residual` may store beyond those of the settings, in codebooks or in longer codes: the
quarter that the other methods spend on scales or codebooks, and what powers of two add to it at the usual widths."""


@dataclass(frozen=True, slots=True)
class Group:
    """Columns of a group, and a remark where they are not what the settings say (else empty)."""

    columns: int
    remark: str


def group_for(weight: Weight, wanted: int, setting: str) -> Group:
    """The largest usable group of `weight` [out, in] for the group size `wanted` that `setting` asks for.

    A matrix takes exactly `wanted`. A LoRA factor, whose sides are ranks, takes the greatest common divisor, or one
    group a row if that is below SMALLEST_GROUP. Raises PlanError if neither works.
    """
    columns = weight.shape[1]
    if columns % wanted == 0:
        return Group(wanted, "")
    common = math.gcd(columns, wanted)
    if weight.weight_class == "lora" and common >= SMALLEST_GROUP:
        return Group(common, f"groups of {common}, because {wanted} does not divide {columns} columns")
    if weight.weight_class == "lora" and columns <= wanted:
        return Group(columns, f"one group a row of {columns} columns, because {wanted} does not divide them")
    divisors = [size for size in (16, 32, 64, 128, 256) if columns % size == 0] or [columns]
    raise PlanError(
        f"{weight.name}: {setting} {wanted} does not divide its {columns} columns; "
        f"set {setting} to a divisor such as {' or '.join(map(str, divisors))}"
    )


def scalar_layout(weight: Weight, settings: Resolved, bits: int) -> tuple[ScalarLayout, str]:
    """The SQ arm's layout of a matrix or LoRA factor in `bits` bits, and a remark. Raises PlanError."""
    group = group_for(weight, settings.scalar.group_size, "quantize.scalar.group_size")
    rows, columns = weight.shape
    return ScalarLayout(rows, columns, bits, group.columns, settings.scalar.symmetric), group.remark


def vector_layout(weight: Weight, settings: Resolved) -> tuple[VectorLayout, str]:
    """The VQ arm's layout of a matrix or LoRA factor, and a remark. Raises PlanError naming the weight and a remedy."""
    arm = settings.vector
    group = group_for(weight, arm.group_columns, "quantize.vector.group_columns")
    rows, columns = weight.shape
    entries = 1 << (settings.bits * arm.dimension)
    if entries > MAX_ENTRIES:
        raise PlanError(
            f"{weight.name}: {settings.bits} bits with dimension {arm.dimension} need a codebook of {entries} entries, "
            f"at most {MAX_ENTRIES} are possible; lower quantize.bits or quantize.vector.dimension, or use policy sq"
        )
    group_rows = min(rows, arm.group_rows)
    codebook = entries * arm.dimension * arm.codebook_bits
    codes = settings.bits * group_rows * group.columns
    if weight.weight_class == "matrix" and codebook > codes:
        raise PlanError(
            f"{weight.name}: a codebook of {codebook} bits would serve a group of {codes} bits of codes; "
            "enlarge quantize.vector.group_rows or group_columns, or lower bits or dimension"
        )
    groups = -(-rows // group_rows) * (columns // group.columns)
    try:
        layout = VectorLayout(
            rows=rows,
            columns=columns,
            dimension=arm.dimension,
            entries=entries,
            group_rows=group_rows,
            group_columns=group.columns,
            codebook_bits=arm.codebook_bits,
            svd_rank=_svd_rank(arm, entries, groups),
        )
    except ShapeError as error:
        raise PlanError(f"{weight.name}: {error}; change quantize.vector or quantize.bits") from error
    return layout, group.remark


def _svd_rank(arm: VectorArm, entries: int, groups: int) -> int | None:
    """Kept components of the stacked codebooks [groups, entries], None without a decomposition."""
    if arm.svd_fraction == 1.0:
        return None
    return max(1, min(groups, round(arm.svd_fraction * entries)))


def affine_layout(weight: Weight, settings: Resolved) -> tuple[AffineLayout, str]:
    """The layout of policy `hqq` for a matrix or LoRA factor, and a remark. Raises PlanError.

    Groups of 128 do not divide a width of an odd number of heads of 64: such a matrix takes groups of half the size.
    """
    rows, columns = weight.shape
    wanted = settings.scalar.group_size
    if weight.weight_class == "matrix" and columns % wanted and columns % max(wanted // 2, 1) == 0:
        remark = f"groups of {wanted // 2}, because {wanted} does not divide {columns} columns"
        return AffineLayout(rows, columns, settings.bits, wanted // 2), remark
    group = group_for(weight, wanted, "quantize.scalar.group_size")
    return AffineLayout(rows, columns, settings.bits, group.columns), group.remark


def residual_layout(weight: Weight, settings: Resolved) -> tuple[ResidualLayout, str]:
    """The layout of policy `residual` for a matrix or LoRA factor, and a remark. Raises PlanError if none fits.

    Of all pairs of codebooks that, with their codes, store at most RESIDUAL_SPARE bits a weight more than the settings
    say: the one with most bits of codes a weight, then the longest vectors, then the largest main codebook. Small
    weights so get shorter vectors and smaller codebooks.
    """
    rows, columns = weight.shape
    limit = (settings.bits + RESIDUAL_SPARE) * rows * columns
    dimensions = [d for d in (4, 2, 1) if d <= settings.vector.dimension and rows % d == 0]
    pairs = [(main, other) for main in range(1, MAIN_BITS + 1) for other in range(1, main + 1)]
    layouts = [ResidualLayout(rows, columns, d, 1 << main, 1 << other) for d in dimensions for main, other in pairs]
    fitting = [layout for layout in layouts if layout.stored_bits() <= limit]
    if not fitting:
        raise PlanError(
            f"{weight.name}: no two codebooks fit its {rows * columns} weights in {settings.bits} bits each; "
            "raise quantize.bits, or set plan.lora to fp16"
        )
    best = max(fitting, key=lambda layout: (layout.nominal_bits(), layout.dimension, layout.entries))
    sizes = f"{best.entries} + {best.residual_entries} entries of {best.dimension} weights"
    return best, sizes


def _columnwise(kind: type[ScaledLayout | RotatedLayout], weight: Weight, settings: Resolved) -> tuple[Layout, str]:
    scalar, remark = scalar_layout(weight, settings, settings.bits)
    return kind(scalar), remark


LAYOUT_OF: Mapping[Method, Callable[[Weight, Resolved], tuple[Layout, str]]] = {
    "rtn": lambda weight, settings: scalar_layout(weight, settings, settings.bits),
    "gptq": lambda weight, settings: scalar_layout(weight, settings, settings.bits),
    "awq": partial(_columnwise, ScaledLayout),
    "rotation": partial(_columnwise, RotatedLayout),
    "kmeans": vector_layout,
    "gptvq": vector_layout,
    "hqq": affine_layout,
    "residual": residual_layout,
}
"""For each method of a policy's arm: the layout of a matrix or LoRA factor, and a remark."""


def elementwise_layout(weight: Weight, settings: Resolved) -> ElementwiseLayout:
    """Codebooks for blocks of channels of a vector [size]."""
    return ElementwiseLayout(weight.shape[0], settings.elementwise.entries, settings.elementwise.block)


def elementwise_scalar_layout(weight: Weight, settings: Resolved, bits: int) -> ScalarLayout:
    """Asymmetric groups of channels of a vector [size]; a block that does not divide it shrinks to a common divisor."""
    size = weight.shape[0]
    return ScalarLayout(1, size, bits, math.gcd(size, settings.elementwise.block), symmetric=False)


def kept_layout(weight: Weight, dtype: torch.dtype) -> DenseLayout:
    """The weight in its own dtype; float64 is stored as float32."""
    own = next((name for name, known in DTYPES.items() if known == dtype), None)
    return DenseLayout(weight.shape, own or "float32")


def half_layout(weight: Weight, dtype: torch.dtype) -> DenseLayout:
    """The weight in 16 bits: bfloat16 stays, everything else becomes float16."""
    name: DenseDtype = "bfloat16" if dtype == torch.bfloat16 else "float16"
    return DenseLayout(weight.shape, name)
