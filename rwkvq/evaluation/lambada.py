"""LAMBADA: the last word of a passage, its perplexity per word and its accuracy (docs/method.md 10).

Context: everything before the last space; target: that space and everything after it; each tokenised by itself; the
model reads [0] + context + target. The harness' task lambada_openai uses the same formulas without the leading 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rwkvq.documents import check_regular
from rwkvq.engine.model import Engine
from rwkvq.errors import EvaluationError
from rwkvq.evaluation.continuations import Continuation, score_continuations
from rwkvq.evaluation.perplexity import estimate, perplexity
from rwkvq.files import Progress, no_progress
from rwkvq.models.tokenizer import END_OF_TEXT, Tokenizer


@dataclass(frozen=True, slots=True)
class LambadaResult:
    """One model on LAMBADA; logprobs in nats per word (all tokens of the target together).

    ppl = exp(-mean_logprob); acc: share of examples whose target tokens are all the arg max; acc_se is that of a
    proportion, sqrt(acc (1 - acc) / examples), the other errors come from the standard deviation over examples and are
    None for one example. logprobs, correct: per example, in the order of the file.
    """

    examples: int
    target_tokens: int
    bos: int
    ppl: float
    ppl_se: float | None
    acc: float
    acc_se: float
    mean_logprob: float
    mean_logprob_se: float | None
    logprobs: tuple[float, ...]
    correct: tuple[bool, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything but the single examples, as plain JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("logprobs", "correct")}

    def example_rows(self) -> list[dict[str, float | int | bool]]:
        """One row an example: example, logprob, correct."""
        pairs = zip(self.logprobs, self.correct, strict=True)
        return [{"example": i, "logprob": logprob, "correct": right} for i, (logprob, right) in enumerate(pairs)]


def read_examples(path: Path, limit: int | None = None) -> list[str]:
    """Return the first `limit` texts (all for None) of a JSONL file with {"text": ...} on every line.

    Blank lines are passed over. Raises EvaluationError, naming the line, for anything else that is not a text with a
    last word, and for a file without examples.
    """
    try:
        check_regular(path)
        with path.open(encoding="utf-8") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            texts = [_text_of(line, f"{path} line {number}") for number, line in islice(lines, limit)]
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read as UTF-8 text ({error}); expected JSONL") from error
    if not texts:
        raise EvaluationError(f'{path}: found no examples, expected one {{"text": ...}} a line')
    return texts


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f'{where}: is not JSON, expected {{"text": ...}}') from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise EvaluationError(f'{where}: has no text, expected {{"text": ...}}')
    context, space, word = text.rpartition(" ")
    if not space or not word or not context:
        raise EvaluationError(f"{where}: has no last word, expected a context, a space and a word")
    return text


def lambada(
    engine: Engine,
    examples: Sequence[str],
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    batch: int = 16,
    on_batch: Progress = no_progress,
) -> LambadaResult:
    """Measure `engine` on passages whose last space-separated word is to be predicted: the first `limit`, or all.

    Raises EvaluationError for an id outside the vocabulary or a log-probability that is not finite.
    """
    items = [split_example(text, tokenizer) for text in examples[:limit]]
    scores = score_continuations(engine, items, batch=batch, on_batch=on_batch)
    logprobs = torch.tensor([item.logprob for item in scores], dtype=torch.float64)
    if not bool(torch.isfinite(logprobs).all()):
        raise EvaluationError(f"{engine.source.path}: logits are not finite; the weights are damaged")
    mean = estimate(logprobs)
    ppl, acc = perplexity(-mean.mean), sum(item.is_greedy for item in scores) / len(scores)
    return LambadaResult(
        examples=len(scores),
        target_tokens=sum(len(item.target) for item in items),
        bos=END_OF_TEXT,
        ppl=ppl,
        ppl_se=None if mean.se is None else ppl * mean.se,
        acc=acc,
        acc_se=math.sqrt(acc * (1 - acc) / len(scores)),
        mean_logprob=mean.mean,
        mean_logprob_se=mean.se,
        logprobs=tuple(logprobs.tolist()),
        correct=tuple(item.is_greedy for item in scores),
    )


def split_example(text: str, tokenizer: Tokenizer) -> Continuation:
    """Split a passage at its last space into token ids: ([0] + context, space and word)."""
    context, word = text.rsplit(" ", 1)
    return Continuation((END_OF_TEXT, *tokenizer.encode(context)), tuple(tokenizer.encode(" " + word)))
