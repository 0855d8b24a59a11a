"""K-means: every group of weights on its own codebook, all weights equally important, no feedback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.formats.vector import VectorCodes, VectorLayout, codebooks
from rwkvq.quantize.codebooks import CHUNK, Vectors, factors, fit, nearest, store, store_factors
from rwkvq.tensors import is_finite

WEIGHTS = 1 << 22
"""Weights clustered at once."""


def check_shape(weight: Tensor, layout: VectorLayout) -> None:
    """Raise ShapeError unless weight is [layout.rows, layout.columns]."""
    if tuple(weight.shape) != (layout.rows, layout.columns):
        found, expected = list(weight.shape), [layout.rows, layout.columns]
        raise ShapeError(f"weight: found shape {found}, expected {expected} as the layout says; plan again")


def grouped(weight: Tensor, layout: VectorLayout) -> Tensor:
    """Return weight [rows, columns] as vectors [groups, n, d] in the layout's order of groups.

    n = group_rows * group_columns / d, row by row; rows beyond the weight are zeros.
    """
    padded = torch.zeros(layout.row_groups * layout.group_rows, weight.shape[1])
    padded[: layout.rows] = weight
    blocks = padded.view(layout.row_groups, layout.group_rows, -1, layout.group_columns)
    return blocks.transpose(1, 2).reshape(
        -1, layout.group_rows * layout.group_columns // layout.dimension, layout.dimension
    )


def ungrouped(codes: Tensor, layout: VectorLayout) -> Tensor:
    """Return codes [groups, n] of `grouped` vectors as [rows, columns / d] in the layout's dtype."""
    steps = layout.group_columns // layout.dimension
    blocks = codes.view(layout.row_groups, layout.stripes, layout.group_rows, steps).transpose(1, 2)
    return blocks.reshape(-1, layout.stripes * steps)[: layout.rows].to(layout.code_dtype).contiguous()


def quantize(weight: Tensor, layout: VectorLayout, *, iterations: int) -> VectorCodes:
    """Return weight [out, in], any float dtype, in the vector format with small ||W - Q||^2.

    Codebooks are fitted, rounded to what is stored, and then every vector takes the nearest stored entry.
    Raises ShapeError if the layout is for another shape, QuantizationError for NaN or Inf.
    """
    check_shape(weight, layout)
    if not is_finite(weight):
        raise QuantizationError("weight: found NaN or Inf, expected finite values; check the checkpoint")
    tables = torch.cat([fit(part, layout.entries, iterations) for _, part in _parts(weight, layout)])
    if layout.svd_rank is None:
        stored = store(tables, layout)
    else:
        stored = store_factors(*factors(tables.sort(1).values, layout.svd_rank), layout)
    empty = torch.zeros(layout.rows, layout.columns // layout.dimension, dtype=layout.code_dtype)
    result = VectorCodes(layout, empty, stored.codebook, stored.scale, stored.basis)
    tables = codebooks(result).view(layout.groups, layout.entries, layout.dimension)
    codes, start = [], 0
    for part_layout, part in _parts(weight, layout):
        codes.append(_assigned(part, tables[start : start + part_layout.groups], part_layout))
        start += part_layout.groups
    return VectorCodes(layout, torch.cat(codes), stored.codebook, stored.scale, stored.basis)


def _parts(weight: Tensor, layout: VectorLayout) -> Iterator[tuple[VectorLayout, Vectors]]:
    """Yield the vectors of whole groups of rows, not many at once, each with the layout of these rows."""
    rows = max(1, WEIGHTS // (layout.group_rows * layout.columns)) * layout.group_rows
    for some in torch.split(weight, rows):
        part = replace(layout, rows=len(some))
        yield part, Vectors(grouped(some.float(), part), grouped(torch.ones(some.shape), part))


def _assigned(vectors: Vectors, tables: Tensor, layout: VectorLayout) -> Tensor:
    """Return the codes [rows, columns / d] of the nearest entries of tables [groups, K, d]."""
    share = max(1, CHUNK // vectors.values.shape[1])
    pieces = zip(torch.split(vectors.features(), share), torch.split(tables, share), strict=True)
    return ungrouped(torch.cat([nearest(piece, table)[0] for piece, table in pieces]), layout)
