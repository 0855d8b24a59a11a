"""Statistics of one block from its cached inputs: second moments of what linear weights see, importance of element-wise
weights. Accumulators add, merge and finish, so parts may be computed anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from rwkvq.calibration.activations import InputBatch
from rwkvq.calibration.sites import Needs, needs_of
from rwkvq.calibration.spill import Moments, Spilled
from rwkvq.checkpoint.names import Weight
from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.device import CPU
from rwkvq.errors import ActivationError
from rwkvq.models import fitting_batch, observe_block

Weighting = Literal["second_moment", "mean_sq", "official", "none"]

_STRIPES = {"cpu": 128, "cuda": 1024}
"""Columns of a product x^T x that are computed at once; what lies below the diagonal stripe is never computed. A GPU
takes longer to be asked than to compute a narrow stripe."""
IN_MEMORY = 256 << 20
"""Bytes of a block's second moments, together, that stay in memory."""


class Accumulator(Protocol):
    """Sums over batches; adding batches in any grouping and merging gives what one pass gives, to float64 rounding."""

    def add(self, x: Tensor) -> None:
        """Take in x [batch, time, features], float32."""

    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen."""

    def finish(self) -> Tensor:
        """The statistic, float32."""


class SecondMoment:
    """Mean of x x^T over all tokens seen, [features, features].

    Products are formed in float32, one batch at a time, and summed in float64; only the upper triangle is kept, as
    stripes of rows from their diagonal to the end, so that it takes no more memory than the whole in float32. The
    stripes share one allocation: memory of that size goes back to the system when it is freed.
    """

    def __init__(self, features: int, device: torch.device = CPU) -> None:
        self.features = features
        self.device = device
        self.tokens = 0
        self._stripe = stripe = _STRIPES[device.type]
        shapes = [(min(stripe, features - start), features - start) for start in range(0, features, stripe)]
        sums = torch.zeros(sum(map(math.prod, shapes)), dtype=torch.float64, device=device)
        parts = torch.split(sums, [math.prod(shape) for shape in shapes])
        self._stripes = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @property
    def result_bytes(self) -> int:
        """Bytes of what finish returns."""
        return 4 * self.features**2

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in x [batch, time, features], float32; weights [batch, time], at least 0, None = 1 for every token."""
        rows = x.flatten(0, -2)
        self.tokens += len(rows)
        if weights is not None:
            rows = rows * weights.flatten().sqrt()[:, None]
        for index, total in enumerate(self._stripes):
            start = index * self._stripe
            total += rows[:, start : start + self._stripe].T @ rows[:, start:]

    def merge(self, other: SecondMoment) -> None:
        """Take in all that `other` has seen."""
        self.tokens += other.tokens
        for total, added in zip(self._stripes, other._stripes, strict=True):
            total += added

    def finish(self) -> Tensor:
        """Mean of x x^T, float32 [features, features], exactly symmetric; raises ValueError if no token was seen."""
        result = torch.empty(self.features, self.features, device=self.device)
        start = 0
        for rows in self.finished_rows():
            result[start : start + len(rows)] = rows
            start += len(rows)
        return result

    def finished_rows(self) -> Iterator[Tensor]:
        """What finish returns, a few whole rows at a time from the first."""
        if not self.tokens:
            raise ValueError("no tokens")
        for index, stripe in enumerate(self._stripes):
            here = slice(index * self._stripe, index * self._stripe + len(stripe))
            rows = torch.empty(len(stripe), self.features, device=self.device)
            for above, other in enumerate(self._stripes[:index]):
                begin = above * self._stripe
                rows[:, begin : begin + len(other)] = self._mean(other[:, here.start - begin : here.stop - begin]).T
            square = self._mean(stripe[:, : len(stripe)]).triu()
            rows[:, here] = square + square.triu(1).T
            rows[:, here.stop :] = self._mean(stripe[:, len(stripe) :])
            yield rows

    def _mean(self, sums: Tensor) -> Tensor:
        return (sums / self.tokens).float()


class ChannelImportance:
    """The weight s of every channel in sum s (mu - mu^)^2 (docs/method.md 7), [features].

    second_moment: x^2, clipped per sequence and channel at its percentile over tokens, averaged over tokens, then over
    sequences. mean_sq: the same average of x, with |x| clipped, squared at the end. official: mean over sequences of
    |mean over tokens of x|. none: ones.
    """

    def __init__(self, features: int, weighting: Weighting, percentile: float, device: torch.device = CPU) -> None:
        self.features = features
        self.device = device
        self.sequences = 0
        self.weighting = weighting
        self.percentile = percentile
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Take in x [sequences, time, features], float32; each row of the batch is one whole sequence."""
        self.sequences += len(x)
        self._sum += self._means(x).sum(0)

    def _means(self, x: Tensor) -> Tensor:
        """What each sequence adds, float64 [sequences, features]."""
        if self.weighting == "second_moment":
            squares = x.square()
            return squares.clamp_max(percentile_over_time(squares, self.percentile)).mean(1, dtype=torch.float64)
        if self.weighting == "mean_sq":
            limit = percentile_over_time(x.abs(), self.percentile)
            return x.clamp(-limit, limit).mean(1, dtype=torch.float64)
        if self.weighting == "official":
            return x.mean(1, dtype=torch.float64).abs()
        return torch.ones(len(x), x.shape[2], dtype=torch.float64, device=x.device)

    def merge(self, other: ChannelImportance) -> None:
        """Take in all that `other` has seen; it must have the same weighting and percentile."""
        assert (self.weighting, self.percentile) == (other.weighting, other.percentile)
        self.sequences += other.sequences
        self._sum += other._sum

    def finish(self) -> Tensor:
        """Importance >= 0, float32 [features]; raises ValueError if no sequence was seen."""
        if not self.sequences:
            raise ValueError("no sequences")
        mean = self._sum / self.sequences
        return (mean.square() if self.weighting == "mean_sq" else mean).float()


def percentile_over_time(x: Tensor, percentile: float) -> Tensor:
    """The percentile (0 to 100, linear between ranks) of x [batch, time, features] over time: [batch, 1, features]."""
    last = x.shape[1] - 1
    position = last * percentile / 100
    below = math.floor(position)
    # the wanted ranks are near the top: a partial sort is enough
    top = x.topk(x.shape[1] - below, dim=1).values
    low, high = top[:, -1:], top[:, -2:-1] if below < last else top[:, -1:]
    return low + (high - low) * (position - below)


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """What the windows say about one block.

    second_moments: by site, or by weight name for weights with token weights of their own, float32 [in, in], perhaps
    read from disk at each look; importance: by weight name, float32 [size]. tokens: how many went into them. held_out:
    windows that were left out.
    """

    second_moments: Moments
    importance: Mapping[str, Tensor]
    tokens: int
    held_out: int


class BlockAccumulator:
    """The accumulators of one block for the sites that `needs` names; created when a site is first seen.

    token_weights: by weight name, float32 [used windows, time] in the order of the windows, for weights that have a
    second moment of their own, in which tokens count differently.
    """

    def __init__(
        self, needs: Needs, weighting: Weighting, percentile: float, token_weights: Mapping[str, Tensor] | None = None
    ) -> None:
        self.tokens = 0
        self.held_out = 0
        self._needs = needs
        self._weighting = weighting
        self._percentile = percentile
        self._token_weights = token_weights or {}
        self._windows = slice(0, 0)
        self._moments: dict[str, SecondMoment] = {}
        self._importance: dict[str, ChannelImportance] = {}

    def begin(self, windows: int) -> None:
        """The next `windows` windows are to be observed."""
        self._windows = slice(self._windows.stop, self._windows.stop + windows)

    def observe(self, site: str, x: Tensor) -> None:
        """Take in what a site sees, x [batch, time, features]."""
        if site in self._needs.moments:
            self._moment(site, x.shape[-1], x.device).add(x)
        for name in self._needs.weighted.get(site, ()):
            self._moment(name, x.shape[-1], x.device).add(x, self._token_weights[name][self._windows])
        if site in self._needs.importance:
            self._channels(site, x.shape[-1], x.device).add(x)

    def _moment(self, site: str, features: int, device: torch.device) -> SecondMoment:
        if site not in self._moments:
            self._moments[site] = SecondMoment(features, device)
        return self._moments[site]

    def _channels(self, site: str, features: int, device: torch.device) -> ChannelImportance:
        if site not in self._importance:
            self._importance[site] = ChannelImportance(features, self._weighting, self._percentile, device)
        return self._importance[site]

    def merge(self, other: BlockAccumulator) -> None:
        """Take in all that `other` has seen of the same block and needs."""
        self.tokens += other.tokens
        self.held_out += other.held_out
        for site, moment in other._moments.items():
            self._moment(site, moment.features, moment.device).merge(moment)
        for site, importance in other._importance.items():
            self._channels(site, importance.features, importance.device).merge(importance)

    def finish(self, scratch: Path | None = None) -> BlockStatistics:
        """All statistics, of sites that must all have been seen; ends the accumulator. scratch: for large moments."""
        by_site = {site: importance.finish() for site, importance in self._importance.items()}
        importance = {name: by_site[site] for site, names in self._needs.importance.items() for name in names}
        return BlockStatistics(self._finished_moments(scratch), importance, self.tokens, self.held_out)

    def _finished_moments(self, scratch: Path | None) -> Moments:
        size = sum(moment.result_bytes for moment in self._moments.values())
        finished: dict[str, Tensor | Spilled] = {}
        # the small ones first: what they held is free when the largest is finished
        for site in sorted(self._moments, key=lambda name: self._moments[name].features):
            moment = self._moments.pop(site)
            if scratch is None or size <= IN_MEMORY or moment.device.type == "cuda":
                finished[site] = moment.finish()
            else:
                finished[site] = Spilled.of(moment.finished_rows(), moment.features, scratch)
        return Moments(finished)


def accumulate(
    spec: ModelSpec,
    index: int,
    weights: Mapping[str, Tensor],
    batches: Iterable[InputBatch],
    accumulator: BlockAccumulator,
) -> None:
    """Run block `index` once over `batches`, without their held-out windows, and add what its sites see.

    weights: of the block by their name inside it, float32 (models.load_block); ffn.value is not used.
    """
    for batch in batches:
        used = batch.without_held_out()
        accumulator.held_out += len(batch.x) - len(used.x)
        accumulator.tokens += used.x.shape[0] * used.x.shape[1]
        for part in used.parts(fitting_batch(spec, used.x.shape[1], len(used.x))):
            accumulator.begin(len(part.x))
            observe_block(spec, index, weights, part.x, accumulator.observe, v_first=part.v_first)


def collect(
    spec: ModelSpec,
    index: int,
    weights: Mapping[str, Tensor],
    batches: Iterable[InputBatch],
    wanted: Sequence[Weight],
    *,
    weighting: Weighting = "second_moment",
    percentile: float = 99,
    token_weights: Mapping[str, Tensor] | None = None,
    scratch: Path | None = None,
) -> BlockStatistics:
    """The statistics that the `wanted` weights of block `index` need, in one pass over `batches`.

    weights: of the block by their name inside it, float32 (models.load_block); ffn.value is not used. weighting and
    percentile: of element-wise weights. token_weights: see BlockAccumulator. scratch: see its finish. Raises
    ActivationError if every window is held out, and what reading `batches` raises.
    """
    token_weights = token_weights or {}
    accumulator = BlockAccumulator(needs_of(wanted, token_weights), weighting, percentile, token_weights)
    accumulate(spec, index, weights, batches, accumulator)
    if not accumulator.tokens:
        raise ActivationError(f"block {index}: no window is left for statistics; set windows.samples to 1 or more")
    return accumulator.finish(scratch)
