"""Log-probability of a continuation after its context: what LAMBADA and every multiple-choice task ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rwkvq.engine.model import Engine
from rwkvq.evaluation.batches import map_hidden
from rwkvq.evaluation.logprobs import score
from rwkvq.files import Progress, no_progress
from rwkvq.models import BlockState, fitting_batch

_HEAD_SLICE = 256
"""Tokens whose logits exist at once."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """Token ids: a context of at least one (the id that starts a text), and the target that follows, at least one."""

    context: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """logprob: sum over the target of ln p(token | all before), nats; is_greedy: every target token is the arg max."""

    logprob: float
    is_greedy: bool


def score_continuations(
    engine: Engine, items: Sequence[Continuation], *, batch: int, on_batch: Progress = no_progress
) -> list[ContinuationScore]:
    """Score every item, in the order given; `batch` items of similar length run at once on each of torch's threads.

    Shorter rows are padded on the right, which cannot reach back in time. Raises EvaluationError for an unknown id.
    """
    # longest first: what is left for the last thread is short
    order = sorted(range(len(items)), key=lambda i: -len(items[i].context) - len(items[i].target))
    longest = max((len(item.context) + len(item.target) for item in items), default=1)
    batch = fitting_batch(engine.spec, longest, batch)
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    work = [[items[i] for i in group] for group in groups]
    results: dict[int, ContinuationScore] = {}
    for group, scores in zip(groups, map_hidden(partial(_score_batch, engine), work, _inputs, [engine]), strict=True):
        results.update(zip(group, scores, strict=True))
        on_batch("examples", len(results), len(items))
    return [results[i] for i in range(len(items))]


def _rows(items: Sequence[Continuation]) -> list[tuple[int, ...]]:
    return [item.context + item.target[:-1] for item in items]  # nothing is predicted from the last token


def _inputs(items: Sequence[Continuation]) -> Tensor:
    rows = _rows(items)
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids


def _score_batch(engine: Engine, items: Sequence[Continuation], states: list[Tensor]) -> list[ContinuationScore]:
    """Scores of a batch of items whose hidden states [batch, time, width] are states[0]."""
    rows, hidden = _rows(items), states[0]
    ends = [len(row) for row in rows]
    wanted = torch.cat([h[end - len(item.target) : end] for h, end, item in zip(hidden, ends, items, strict=True)])
    logprob, hits = _score_tokens(engine, wanted, torch.tensor([token for item in items for token in item.target]))
    lengths = [len(item.target) for item in items]
    parts = zip(torch.split(logprob, lengths), torch.split(hits, lengths), strict=True)
    return [ContinuationScore(float(values.sum()), bool(right.all())) for values, right in parts]


def _score_tokens(engine: Engine, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability [n] float64 of `targets` [n] after hidden [n, width], and whether each is the arg max."""
    slices = [slice(i, i + _HEAD_SLICE) for i in range(0, len(targets), _HEAD_SLICE)]
    scores = [score([engine.logits(hidden[part])], targets[part])[0] for part in slices]
    best = torch.cat([item.best for item in scores])
    return torch.cat([item.logprob for item in scores]), best == targets


def rolling_logprob(engine: Engine, ids: Sequence[int], *, bos: int, segment: int = 1024) -> float:
    """Return ln p of the whole text `ids` after `bos`, in nats.

    The state is carried from token to token over any length, so every prediction sees everything before it (models
    with a limited context are usually given disjoint windows instead, which is a higher perplexity). `segment` tokens
    run at once, which bounds memory.
    """
    inputs = torch.tensor([[bos, *ids[:-1]]], dtype=torch.int64)
    targets = torch.tensor(list(ids), dtype=torch.int64)
    state: list[BlockState] | None = None
    total = 0.0
    for start in range(0, len(ids), segment):
        part = slice(start, start + segment)
        hidden, state = engine.run(inputs[:, part], state)
        total += float(_score_tokens(engine, hidden[0], targets[part])[0].sum())
    return total
