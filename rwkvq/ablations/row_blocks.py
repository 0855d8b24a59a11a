"""E17: the arm chosen for every block of 64 rows of a matrix, by its own proxies or by its own measured loss.

Only blocks of rows: error feedback runs along the columns, so a stripe of columns of one arm does not fit after a
stripe of the other.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkvq.ablations.arms import Arms, choice_of, lowest
from rwkvq.ablations.cases import Case
from rwkvq.ablations.choices import MODE, ranks
from rwkvq.ablations.mix import ROWS, Choice, Subject
from rwkvq.checkpoint.names import Weight, extract, weights_of
from rwkvq.proxies.coarse import coarse
from rwkvq.proxies.fine import fine
from rwkvq.proxies.gaps import gaps_of, spectrum
from rwkvq.quantize.hessian import loss
from rwkvq.quantize.inputs import Calibration, collect_inputs

EVERY = 4
"""Of so many batches of calibration windows one is used for the losses of rows."""

Scores = Mapping[str, tuple[float, ...]]
"""By weight, one a row block; the lowest become scalar first."""


def row_block_cases(arms: Arms) -> list[Case]:
    """Choices by matrix and by row block: the arm of smaller loss, and half of the weights scalar by proxies or chance.

    Raises CheckpointError, ActivationError.
    """
    losses = block_losses(arms)
    of_blocks = {name: tuple(sq - vq for sq, vq in pairs) for name, pairs in losses.items()}
    of_matrices = {name: (sum(scores),) for name, scores in of_blocks.items()}
    chooser = random.Random(f"E17 {arms.seed}")
    by_chance = {name: tuple(chooser.random() for _ in scores) for name, scores in of_blocks.items()}
    half = choice_of(arms, lowest(ranks(arms, MODE), arms.sizes, 0.5))
    choices: dict[tuple[str, str], Choice] = {
        ("loss", "matrix"): below_zero(of_matrices),
        ("loss", "64 rows"): below_zero(of_blocks),
        ("proxies", "matrix"): half,
        ("proxies", "64 rows"): lowest_blocks(block_ranks(arms), arms, 0.5),
        ("chance", "64 rows"): lowest_blocks(by_chance, arms, 0.5),
    }
    return [
        Case(f"by {by}, each {unit}", {"by": by, "unit": unit}, Subject("vq", choice))
        for (by, unit), choice in choices.items()
    ]


def below_zero(scores: Scores) -> Choice:
    """SQ wherever the score is below 0."""
    return {name: tuple("sq" if score < 0 else "vq" for score in blocks) for name, blocks in scores.items()}


def lowest_blocks(scores: Scores, arms: Arms, share: float) -> Choice:
    """SQ for the row blocks of the lowest scores of all matrices, as few as make `share` of all weights."""
    flat = {f"{name} {index:05d}": score for name, blocks in scores.items() for index, score in enumerate(blocks)}
    rows = {name: arms.decided[name].shape[0] for name in scores}
    sizes = {
        f"{name} {index:05d}": min(ROWS, rows[name] - index * ROWS) * arms.decided[name].shape[1]
        for name, blocks in scores.items()
        for index in range(len(blocks))
    }
    chosen = lowest(flat, sizes, share)
    return {
        name: tuple("sq" if f"{name} {index:05d}" in chosen else "vq" for index in range(len(blocks)))
        for name, blocks in scores.items()
    }


def _weights(arms: Arms) -> list[Weight]:
    source = arms.checkpoint
    weights = weights_of(source.spec, {name: source.shape(name) for name in source.names()})
    return [weight for weight in weights if weight.name in arms.decided]


def block_ranks(arms: Arms) -> Scores:
    """The larger rank of both proxies of every row block among all of them."""
    quantiles = arms.runs["sq"].settings.proxies.quantiles
    by_c: dict[tuple[str, int], float] = {}
    by_f: dict[tuple[str, int], float] = {}
    for weight in _weights(arms):
        whole = extract(arms.checkpoint.tensor(weight.tensor), weight)
        for index, block in enumerate(torch.split(whole, ROWS)):
            gaps = gaps_of(spectrum(block), MODE, quantiles=quantiles)
            by_c[weight.name, index], by_f[weight.name, index] = coarse(gaps), fine(gaps)
    places = [{key: place for place, key in enumerate(sorted(by, key=lambda k: (by[k], k)))} for by in (by_c, by_f)]
    found: dict[str, tuple[float, ...]] = {}
    for key in by_c:
        found[key[0]] = (*found.get(key[0], ()), float(max(place[key] for place in places)))
    return found


def block_losses(arms: Arms) -> dict[str, list[tuple[float, float]]]:
    """Squared output error of both arms by weight and row block, over calibration tokens."""
    weights, found = _weights(arms), {}
    run = arms.runs["sq"]
    for block in range(arms.checkpoint.spec.layers):
        wanted = [weight for weight in weights if weight.block == block]
        with tempfile.TemporaryDirectory() as scratch:
            calibration = Calibration(run.activations, run.gradients, Path(scratch), every=EVERY)
            inputs = collect_inputs(arms.checkpoint, block, wanted, (), calibration)
            for weight in wanted:
                original = extract(arms.checkpoint.tensor(weight.tensor), weight).float()
                moment = inputs.second_moments[weight.name]
                pair = [_by_block(original, arms.artifacts[line].weight(weight.name), moment) for line in ("sq", "vq")]
                found[weight.name] = list(zip(*pair, strict=True))
    return found


def _by_block(weight: Tensor, decoded: Tensor, second_moment: Tensor) -> list[float]:
    """tr(dW H dW^T) of every ROWS rows of weight [out, in]."""
    pairs = zip(torch.split(weight, ROWS), torch.split(decoded, ROWS), strict=True)
    return [loss(original, coded, second_moment) for original, coded in pairs]
