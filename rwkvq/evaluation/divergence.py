"""Models compared on the same text in one pass: perplexity, KL and top-1 agreement (docs/method.md 10)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkvq.calibration.windows import model_inputs
from rwkvq.engine.model import Engine
from rwkvq.errors import EvaluationError
from rwkvq.evaluation.batches import map_hidden
from rwkvq.evaluation.logprobs import TokenScores, score
from rwkvq.evaluation.perplexity import estimate, ids_sha256, perplexity
from rwkvq.files import Progress, no_progress
from rwkvq.models import fitting_batch

FLOAT = "float"
"""Name of the reference in the results."""
POSITION_BUCKETS = 8
"""KL is also given over this many equal stretches of a window, to show whether errors grow along the recurrence."""
_HEAD_SLICE = 256
"""Tokens whose logits exist at once."""


@dataclass(frozen=True, slots=True)
class TextResult:
    """One model on one text; nll and kl in nats per token, *_se the standard error of a mean over windows.

    kl: mean over tokens of sum_x p(x) (ln p(x) - ln q(x)), p the reference; top1: share of tokens where both have the
    same arg max; delta_nll: nll less the reference's, with the error of the paired difference. All of these are None
    for the reference itself, every *_se is None for a single window. window_*: the means of each window.
    """

    predictions: int
    ids_sha256: str
    nll: float
    nll_se: float | None
    ppl: float
    ppl_se: float | None
    delta_nll: float | None
    delta_nll_se: float | None
    kl: float | None
    kl_se: float | None
    kl_p99: float | None
    kl_by_position: tuple[float, ...] | None
    top1: float | None
    top1_se: float | None
    window_nll: tuple[float, ...]
    window_kl: tuple[float, ...] | None
    window_top1: tuple[float, ...] | None

    def to_json(self) -> dict[str, Any]:
        """Everything but the window means, as plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: value for name, value in values.items() if not name.startswith("window_")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def window_rows(self) -> list[dict[str, float | int | None]]:
        """One row a window: window, nll, kl, top1."""
        empty = (None,) * len(self.window_nll)
        columns = zip(self.window_nll, self.window_kl or empty, self.window_top1 or empty, strict=True)
        return [{"window": i, "nll": nll, "kl": kl, "top1": top1} for i, (nll, kl, top1) in enumerate(columns)]


def compare_on_text(
    reference: Engine,
    others: Mapping[str, Engine],
    ids: Tensor,
    *,
    batch: int = 4,
    on_batch: Progress = no_progress,
) -> dict[str, TextResult]:
    """Measure `reference` (result `float`) and every one of `others` on windows of ids [windows, length] int64.

    Each window starts from a zero state; the model reads [0, w_1 .. w_{L-1}] and predicts [w_1 .. w_L]. With no others
    this is plain perplexity. `batch` windows run at once on each of torch's threads; results do not depend on it
    beyond float32 rounding, and not at all on the number of threads or on what the engines keep. Raises
    EvaluationError if vocabularies differ, an id is outside the vocabulary, or a model's logits are not finite.
    """
    engines = {FLOAT: reference, **others}
    assert len(engines) == len(others) + 1, "`float` is the name of the reference"
    _check_vocabularies(engines)
    scores: list[list[TokenScores]] = []
    models, done = list(engines.values()), 0
    batch = fitting_batch(reference.spec, ids.shape[1], batch)
    batches = torch.split(ids, batch)
    found_in_order = map_hidden(partial(_score_windows, models), batches, _inputs, models)
    for part, found in zip(batches, found_in_order, strict=True):
        scores += found
        done += len(part)
        on_batch("windows", done, len(ids))
    columns = [_joined(list(parts), len(ids)) for parts in zip(*scores, strict=True)]
    for name, (logprob, _best, _kl) in zip(engines, columns, strict=True):
        if not bool(torch.isfinite(logprob).all()):
            raise EvaluationError(f"{engines[name].source.path}: logits are not finite; the weights are damaged")
    return {name: _result(columns[i], columns[0], ids) for i, name in enumerate(engines)}


_Columns = tuple[Tensor, Tensor, Tensor | None]  # logprob, best, kl: [windows, length]


def _inputs(ids: Tensor) -> Tensor:
    return torch.from_numpy(model_inputs(ids.numpy()))


def _score_windows(engines: list[Engine], ids: Tensor, states: list[Tensor]) -> list[list[TokenScores]]:
    """Scores of a batch of windows, slice by slice of tokens; in each slice one entry an engine.

    states: of every engine, [batch, length, width].
    """
    hidden = [state.flatten(0, 1) for state in states]
    targets = ids.flatten()
    slices = [slice(i, i + _HEAD_SLICE) for i in range(0, len(targets), _HEAD_SLICE)]
    return [score([engine.logits(h[s]) for engine, h in zip(engines, hidden, strict=True)], targets[s]) for s in slices]


def _joined(parts: list[TokenScores], windows: int) -> _Columns:
    kl = None if parts[0].kl is None else torch.cat([part.kl for part in parts if part.kl is not None])
    logprob, best = torch.cat([part.logprob for part in parts]), torch.cat([part.best for part in parts])
    return logprob.view(windows, -1), best.view(windows, -1), None if kl is None else kl.view(windows, -1)


def _result(columns: _Columns, reference: _Columns, ids: Tensor) -> TextResult:
    logprob, best, kl = columns
    nll = estimate(-logprob.mean(1))
    ppl = perplexity(nll.mean)
    delta = None if kl is None else estimate((reference[0] - logprob).mean(1))
    kl_estimate = None if kl is None else estimate(kl.mean(1))
    same = None if kl is None else (best == reference[1]).double().mean(1)
    top1 = None if same is None else estimate(same)
    return TextResult(
        predictions=ids.numel(),
        ids_sha256=ids_sha256(ids),
        nll=nll.mean,
        nll_se=nll.se,
        ppl=ppl,
        ppl_se=None if nll.se is None else ppl * nll.se,
        delta_nll=None if delta is None else delta.mean,
        delta_nll_se=None if delta is None else delta.se,
        kl=None if kl_estimate is None else kl_estimate.mean,
        kl_se=None if kl_estimate is None else kl_estimate.se,
        kl_p99=None if kl is None else float(np.quantile(kl.numpy(), 0.99)),
        kl_by_position=None if kl is None else _by_position(kl),
        top1=None if top1 is None else top1.mean,
        top1_se=None if top1 is None else top1.se,
        window_nll=tuple((-logprob.mean(1)).tolist()),
        window_kl=None if kl is None else tuple(kl.mean(1).tolist()),
        window_top1=None if same is None else tuple(same.tolist()),
    )


def _by_position(kl: Tensor) -> tuple[float, ...]:
    """Mean KL of equal stretches of the window, first to last; at most POSITION_BUCKETS."""
    return tuple(float(part.mean()) for part in kl.mean(0).tensor_split(min(POSITION_BUCKETS, kl.shape[1])))


def _check_vocabularies(engines: Mapping[str, Engine]) -> None:
    sizes = {str(engine.source.path): engine.spec.vocab for engine in engines.values()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{path} has {size}" for path, size in sizes.items())
        raise EvaluationError(f"vocabularies differ: {found}; compare models of one vocabulary")
