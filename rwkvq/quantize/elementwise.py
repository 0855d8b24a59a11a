"""Codebooks of element-wise weights: exact weighted one-dimensional k-means, block by block (docs/method.md 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.formats.elementwise import ElementwiseCodes, ElementwiseLayout
from rwkvq.quantize.codebooks import to_int8

CHUNK = 1 << 20
"""Segment costs held at once."""

FAINT = 1e-9
"""Every channel weighs at least this fraction of the mean, so that channels that never fired still get a code."""


def _segment_costs(values: Tensor, weights: Tensor) -> Tensor:
    """Return costs [blocks, n + 1, n + 1]: of the values i .. j - 1 around their weighted mean; infinite for i > j.

    values [blocks, n] ascending, weights [blocks, n] > 0, both float64. From sums up to each value: a segment costs
    sum s x^2 - (sum s x)^2 / sum s.
    """
    terms = torch.stack([weights, weights * values, weights * values.square()])
    sums = torch.nn.functional.pad(terms.cumsum(-1), (1, 0))  # [3, blocks, n + 1]
    mass, moment, square = sums[..., None, :] - sums[..., :, None]  # each [blocks, i, j]
    costs: Tensor = (square - moment.square() / torch.where(mass > 0, mass, 1.0)).clamp_min(0)
    size = costs.shape[-1]
    backwards = torch.ones(size, size, dtype=torch.bool).tril(-1)
    return costs.masked_fill(backwards, torch.inf)


def cluster(values: Tensor, weights: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Return (centroids [blocks, entries] ascending, cost [blocks]): the least sum_j s_j (x_j - c)^2, exactly.

    values, weights [blocks, n], weights >= 0; float64 inside. Where a block has fewer distinct values than entries,
    centroids repeat. Dynamic programming over the sorted values: optimal clusters are segments.
    """
    weights = weights.double()
    mean = weights.mean(1, keepdim=True)
    weights = torch.where(mean > 0, weights + FAINT * mean, 1.0)
    order = values.double().argsort(dim=1, stable=True)
    values, weights = values.double().gather(1, order), weights.gather(1, order)
    centre = values.mean(1, keepdim=True)  # sums of squares around it lose fewer digits
    costs = _segment_costs(values - centre, weights)
    best, starts = costs[:, 0], []  # one segment
    for _ in range(entries - 1):
        best, start = (best[:, :, None] + costs).min(1)  # over i, where the last segment starts
        starts.append(start)
    end = torch.full((len(values), 1), values.shape[1])
    sums = torch.nn.functional.pad(torch.stack([weights, weights * values]).cumsum(-1), (1, 0))
    centroids: list[Tensor] = []
    first = torch.zeros(costs.shape[:2], dtype=torch.int64)
    for start in [*reversed(starts), first]:
        begin = start.gather(1, end)
        mass, moment = (item.gather(1, end) - item.gather(1, begin) for item in sums)
        empty = centroids[-1] if centroids else values[:, -1:]
        centroids.append(torch.where(end > begin, moment / torch.where(mass > 0, mass, 1.0), empty))
        end = begin
    return torch.cat(centroids[::-1], 1), best[:, -1]


def quantize(vector: Tensor, importance: Tensor, layout: ElementwiseLayout) -> ElementwiseCodes:
    """Return vector [size], any float dtype, with small sum_j importance_j (x_j - Q_j)^2; importance [size] >= 0.

    Codebooks are exact optima rounded to int8; then every channel takes the nearest stored value. Raises ShapeError for
    other shapes, QuantizationError for NaN, Inf or an importance below 0.
    """
    for name, tensor in (("vector", vector), ("importance", importance)):
        if tuple(tensor.shape) != (layout.size,):
            raise ShapeError(f"{name}: found shape {list(tensor.shape)}, expected [{layout.size}]; plan again")
        if not bool(torch.isfinite(tensor).all()):
            raise QuantizationError(f"{name}: found NaN or Inf, expected finite values; check what it comes from")
    if bool((importance < 0).any()):
        raise QuantizationError("importance: found values below 0, expected second moments; collect statistics again")
    whole = layout.size // layout.block * layout.block
    tables = [_centroids(vector[:whole], importance[:whole], layout.block, layout.entries)] if whole else []
    if whole < layout.size:
        tables.append(_centroids(vector[whole:], importance[whole:], layout.size - whole, layout.entries))
    codebook, scale = to_int8(torch.cat(tables).float(), (1,))
    stored = codebook.float() * scale.float()  # [blocks, entries]
    block_of = torch.arange(layout.size) // layout.block
    codes = (vector.float()[:, None] - stored[block_of]).abs().argmin(1)
    return ElementwiseCodes(layout, codes.to(torch.uint8), codebook, scale.view(-1))


def _centroids(vector: Tensor, importance: Tensor, block: int, entries: int) -> Tensor:
    """Return centroids [blocks, entries] of whole blocks, a few blocks at a time."""
    share = max(1, CHUNK // (block + 1) ** 2)
    values, weights = vector.view(-1, block), importance.view(-1, block)
    starts = range(0, len(values), share)
    return torch.cat([cluster(values[at : at + share], weights[at : at + share], entries)[0] for at in starts])
