"""Text from a model: one continuation of a prompt, or many rows at once as calibration text without data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rwkvq.engine.model import Engine, open_model, open_tokenizer
from rwkvq.errors import SettingsError
from rwkvq.files import Progress, no_progress, write_text
from rwkvq.models.tokenizer import END_OF_TEXT, Tokenizer


def draw(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Return one token id per row, int64 [rows], by inverting the cumulative distribution at `uniforms`.

    logits [rows, vocab]; uniforms [rows] in [0, 1). Temperature 0 takes the arg max. Only the smallest set of most
    probable tokens whose probability reaches top_p can be drawn (nucleus sampling, arXiv 1904.09751); ties in
    probability are ordered by id. A row's result depends on that row alone, so batching changes nothing.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = falling.cumsum(-1) - falling
    kept = torch.where(before < top_p, falling, torch.zeros_like(falling))
    cumulative = kept.cumsum(-1)
    place = torch.searchsorted(cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True)
    # u * total can round up to the total itself, which lies beyond the last kept token
    place = torch.minimum(place, (kept > 0).sum(-1, keepdim=True) - 1)
    return order.gather(1, place).squeeze(1)


def stream(
    engine: Engine, prompt_ids: Sequence[int], *, temperature: float, top_p: float, generator: torch.Generator
) -> Iterator[int]:
    """Yield token ids that continue [0] + prompt_ids, without end.

    Raises SettingsError for a temperature below 0 or a top_p outside (0, 1], EvaluationError for an unknown id.
    """
    _check(temperature, top_p)
    ids = torch.tensor([[END_OF_TEXT, *prompt_ids]], dtype=torch.int64)
    hidden, state = engine.run(ids, None)
    while True:
        logits = engine.logits(hidden[:, -1])
        uniform = torch.rand(1, dtype=torch.float64, generator=generator)
        chosen = draw(logits, uniform, temperature=temperature, top_p=top_p)
        yield int(chosen)
        hidden, state = engine.run(chosen[:, None], state)


def generate(
    engine: Engine,
    prompt_ids: Sequence[int],
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> list[int]:
    """Return at most `tokens` ids that continue [0] + prompt_ids; id 0, the end of a text, ends it and is left out."""
    result: list[int] = []
    for token in islice(stream(engine, prompt_ids, temperature=temperature, top_p=top_p, generator=generator), tokens):
        if token == END_OF_TEXT:
            break
        result.append(token)
    return result


def generate_text(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    until: Sequence[str] = (),
) -> str:
    """Return the text that follows `prompt`: at most `tokens` tokens, ended by id 0 or before the first of `until`."""
    result: list[int] = []
    text = ""
    ids = stream(engine, tokenizer.encode(prompt), temperature=temperature, top_p=top_p, generator=generator)
    for token in islice(ids, tokens):
        if token == END_OF_TEXT:
            break
        result.append(token)
        text = tokenizer.decode(result)  # as a whole: a character may need several tokens
        ends = [place for stop in until if stop and (place := text.find(stop)) >= 0]
        if ends:
            return text[: min(ends)]
    return text


def sample_ids(
    engine: Engine, uniforms: Tensor, *, temperature: float, top_p: float, on_step: Progress = no_progress
) -> Tensor:
    """Return sampled ids [rows, tokens] int64, every row from [0] and a zero state, one random number a token.

    uniforms [rows, tokens] in [0, 1). Rows run side by side; id 0 is kept, the next text follows it in the same row.
    """
    _check(temperature, top_p)
    rows, tokens = uniforms.shape
    result = torch.empty(rows, tokens, dtype=torch.int64)
    last, state = torch.full((rows, 1), END_OF_TEXT), engine.initial_state(rows)
    for step in range(tokens):
        logits, state = engine.forward(last, state)
        result[:, step] = draw(logits[:, 0], uniforms[:, step], temperature=temperature, top_p=top_p)
        last = result[:, step : step + 1]
        on_step("tokens", step + 1, tokens)
    return result


def sample_texts(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    texts: int,
    tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator,
    on_step: Progress = no_progress,
) -> list[str]:
    """Return `texts` texts of `tokens` sampled tokens each, for calibration without data.

    All rows run as one batch. Where the model ended a text and began another, the two are joined by an empty line.
    """
    uniforms = torch.rand(texts, tokens, dtype=torch.float64, generator=generator)
    rows = sample_ids(engine, uniforms, temperature=temperature, top_p=top_p, on_step=on_step)
    return ["\n\n".join(tokenizer.decode(part) for part in _parts(row)) for row in rows.tolist()]


def continue_text(
    model: Path,
    tokenizer: Path | None,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> str:
    """Return the text that the model at `model` writes after `prompt`; `tokenizer` None = the artifact's own."""
    engine, text_tokenizer = _opened(model, tokenizer)
    ids = generate(
        engine,
        text_tokenizer.encode(prompt),
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        generator=torch.Generator().manual_seed(seed),
    )
    return text_tokenizer.decode(ids)


def write_samples(
    model: Path,
    tokenizer: Path | None,
    out: Path,
    *,
    samples: int,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    progress: Progress = no_progress,
) -> None:
    """Write `samples` sampled texts to the JSONL file `out`, one {"text": ...} a line. Raises OutputError."""
    engine, text_tokenizer = _opened(model, tokenizer)
    texts = sample_texts(
        engine,
        text_tokenizer,
        texts=samples,
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        generator=torch.Generator().manual_seed(seed),
        on_step=progress,
    )
    write_text(out, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def _opened(model: Path, tokenizer: Path | None) -> tuple[Engine, Tokenizer]:
    """Open a model and the tokenizer that fits it."""
    engine = Engine(open_model(model))
    return engine, open_tokenizer(model, tokenizer, engine.spec)


def _parts(ids: Sequence[int]) -> list[list[int]]:
    """Split at id 0; empty parts are left out."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == END_OF_TEXT:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]


def _check(temperature: float, top_p: float) -> None:
    problems = []
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature: found {temperature}, expected a number of at least 0")
    if not 0 < top_p <= 1:
        problems.append(f"top_p: found {top_p}, expected a number above 0 and at most 1")
    if problems:
        raise SettingsError("sampling", problems)
