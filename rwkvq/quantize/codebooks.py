"""Codebooks: fitting them to weighted vectors by expectation maximisation, and rounding them to what is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvq.formats.parts import MAX_SCALE, half_scale
from rwkvq.formats.vector import VectorLayout

CHUNK = 1 << 18
"""Distances computed at once: few enough to stay in a cache."""

TOLERANCE = 1e-3
"""A fit ends when one iteration lowers the error by less than this fraction of it."""

LARGEST = 127
"""int8 codebooks are symmetric."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """Vectors to be clustered, group by group.

    values [groups, n, d] float32; weights [groups, n, d] float32 >= 0, all 0 for vectors that only fill up a group.
    """

    values: Tensor
    weights: Tensor

    def features(self) -> Tensor:
        """Return [groups, n, 2 d] = (weights, weights * values), whose sums give weighted means."""
        return torch.cat([self.weights, self.weights * self.values], -1)


def nearest(features: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes int64, distance) [groups, n]: the entry of smallest sum_j weight_j (v_j - c_j)^2.

    features [groups, n, 2 d] of `Vectors`; tables [groups, entries, d]. The part of the distance without c, the same
    for every entry, is left out.
    """
    terms = torch.cat([tables.square(), -2 * tables], -1).transpose(1, 2)  # [groups, 2 d, entries]
    share = max(1, CHUNK // (terms.shape[0] * terms.shape[2]))
    found = [torch.bmm(piece, terms).min(-1) for piece in torch.split(features, share, 1)]
    return torch.cat([item.indices for item in found], 1), torch.cat([item.values for item in found], 1)


def initial(vectors: Vectors, entries: int) -> Tensor:
    """Return tables [groups, entries, d]: vectors at evenly spaced ranks.

    Ranked by value for d = 1, else by the Mahalanobis distance to their mean (docs/method.md 6).
    """
    groups, _count, dimension = vectors.values.shape
    real = vectors.weights.amax(-1) > 0  # [groups, n]
    if dimension == 1:
        key = vectors.values[..., 0]
    else:
        share = real.float() / real.sum(1, keepdim=True)
        centred = vectors.values - (vectors.values * share[..., None]).sum(1, keepdim=True)
        covariance = (centred * share[..., None]).transpose(1, 2) @ centred  # [groups, d, d]
        ridge = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30) * 1e-6
        inverse = torch.linalg.inv(covariance + ridge[:, None, None] * torch.eye(dimension))
        key = ((centred @ inverse) * centred).sum(-1)
    order = key.masked_fill(~real, torch.inf).argsort(dim=1, stable=True)  # fillers last
    steps = (torch.arange(entries) + 0.5) / entries
    ranks = (steps * real.sum(1, keepdim=True)).long()  # [groups, entries]
    chosen = order.gather(1, ranks)
    return vectors.values.gather(1, chosen[..., None].expand(groups, entries, dimension))


def _reseeded(tables: Tensor, empty: Tensor, error: Tensor, values: Tensor) -> Tensor:
    """Return tables with every empty entry at a vector of its group: the e-th at the one of e-th largest error."""
    most = int(empty.sum(1).max())
    worst = error.argsort(dim=1, descending=True, stable=True)[:, :most]  # [groups, most]
    rank = (empty.cumsum(1) - 1).clamp(0, worst.shape[1] - 1)  # [groups, entries]
    chosen = worst.gather(1, rank)
    seeds = values.gather(1, chosen[..., None].expand(*chosen.shape, values.shape[-1]))
    return torch.where(empty[..., None], seeds, tables)


def _fit_chunk(vectors: Vectors, tables: Tensor, iterations: int) -> Tensor:
    """Run expectation maximisation from `tables` until assignments repeat or the error hardly falls."""
    groups, entries, dimension = tables.shape
    features = vectors.features()
    constant = (vectors.weights * vectors.values.square()).sum(-1)
    offset = torch.arange(groups)[:, None] * entries
    before, codes_before = torch.inf, None
    for _ in range(iterations):
        codes, distance = nearest(features, tables)
        error = (distance + constant).clamp_min(0)
        sums = torch.zeros(groups * entries, 2 * dimension)
        sums.index_add_(0, (codes + offset).view(-1), features.view(-1, 2 * dimension))
        mass, moment = torch.split(sums.view(groups, entries, -1), dimension, -1)
        empty = mass.amax(-1) <= 0
        means = moment / mass.clamp_min(torch.finfo(torch.float32).tiny)
        tables = torch.where(mass > 0, means, tables)
        total = float(error.sum(dtype=torch.float64))
        if bool(empty.any()):
            tables = _reseeded(tables, empty, error, vectors.values)
        elif before - total <= TOLERANCE * total or (codes_before is not None and torch.equal(codes, codes_before)):
            break
        before, codes_before = total, codes
    return tables


def fit(vectors: Vectors, entries: int, iterations: int) -> Tensor:
    """Return tables [groups, entries, d] of small weighted squared error; deterministic, at most `iterations` steps.

    Where a group has fewer distinct vectors than entries, the unused entries repeat vectors.
    """
    tables = initial(vectors, entries)
    share = max(1, CHUNK // (vectors.values.shape[1] * entries))
    chunks = zip(*(torch.split(item, share) for item in (vectors.values, vectors.weights, tables)), strict=True)
    return torch.cat([_fit_chunk(Vectors(values, weights), start, iterations) for values, weights, start in chunks])


@dataclass(frozen=True, slots=True)
class Stored:
    """Codebooks as `VectorLayout.parts` stores them, for all groups of a weight."""

    codebook: Tensor
    scale: Tensor | None
    basis: Tensor | None


def to_int8(values: Tensor, dimensions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return (int8 values, float16 scale) with one scale over `dimensions`, kept as axes of size 1."""
    scale = half_scale(values.abs().amax(dimensions, keepdim=True) / LARGEST)
    return (values / scale.float()).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def store(tables: Tensor, layout: VectorLayout) -> Stored:
    """Return float tables [groups, entries, d] rounded to a layout without SVD."""
    if layout.codebook_bits == 16:
        return Stored(tables.clamp(-MAX_SCALE, MAX_SCALE).to(torch.float16), None, None)
    codebook, scale = to_int8(tables, (1, 2))
    return Stored(codebook, scale.view(-1), None)


def store_factors(coefficients: Tensor, basis: Tensor, layout: VectorLayout) -> Stored:
    """Return coefficients [groups, r] and basis [r, entries] rounded to a layout with svd_rank r.

    One scale for each stripe and coefficient: singular values, hence coefficients, differ much in size.
    """
    grid = coefficients.view(layout.row_groups, layout.stripes, -1)
    codebook, scale = to_int8(grid, (0,))
    return Stored(codebook.view(layout.groups, -1), scale[0], basis.clamp(-MAX_SCALE, MAX_SCALE).to(torch.float16))


def factors(tables: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (coefficients [groups, rank], basis [rank, entries]) that approximate tables [groups, entries, 1] best.

    The rows should be sorted, so that entries of one rank are alike.
    """
    left, values, right = torch.linalg.svd(tables[..., 0].double(), full_matrices=False)
    kept = min(rank, len(values))
    coefficients = torch.zeros(tables.shape[0], rank)
    basis = torch.zeros(rank, tables.shape[1])
    coefficients[:, :kept] = (left[:, :kept] * values[:kept]).float()
    basis[:kept] = right[:kept].float()
    return coefficients, basis
