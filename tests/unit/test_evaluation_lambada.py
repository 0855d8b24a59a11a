from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.engine.model import Engine
from rwkvq.errors import EvaluationError
from rwkvq.evaluation.continuations import score_continuations
from rwkvq.evaluation.lambada import lambada, read_examples, split_example
from rwkvq.models.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import write_byte_vocabulary, write_tiny

TEXTS = ["the cat sat on the mat", "a  b", 'she said "no\nnever" again', "x y"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_byte_vocabulary(tmp_path / "words.txt"))


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(open_checkpoint(write_tiny(tmp_path / "model.pth", "x070")))


def test_an_example_is_split_at_its_last_space(tokenizer: Tokenizer) -> None:
    item = split_example("a b c", tokenizer)
    assert item.context == (0, *tokenizer.encode("a b"))
    assert item.target == tuple(tokenizer.encode(" c"))


def test_figures_equal_their_definitions(engine: Engine, tokenizer: Tokenizer) -> None:
    result = lambada(engine, TEXTS, tokenizer, batch=3)
    scores = score_continuations(engine, [split_example(text, tokenizer) for text in TEXTS], batch=1)
    logprobs = [score.logprob for score in scores]
    assert result.logprobs == pytest.approx(logprobs, rel=1e-5)
    mean = sum(logprobs) / 4
    assert result.ppl == pytest.approx(math.exp(-mean), rel=1e-4)
    spread = math.sqrt(sum((value - mean) ** 2 for value in logprobs) / 3)
    assert result.mean_logprob_se == pytest.approx(spread / 2, rel=1e-4)
    assert result.ppl_se == pytest.approx(result.ppl * spread / 2, rel=1e-4)
    assert result.acc == sum(result.correct) / 4
    assert result.acc_se == math.sqrt(result.acc * (1 - result.acc) / 4)
    assert (result.examples, result.target_tokens, result.bos) == (4, 4 + 2 + 6 + 2, 0)
    assert [row["logprob"] for row in result.example_rows()] == list(result.logprobs)
    assert "logprobs" not in result.to_json() and json.dumps(result.to_json())


def test_limit_takes_the_first_examples(engine: Engine, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n\n", encoding="utf-8")
    assert read_examples(path) == TEXTS
    assert read_examples(path, 2) == TEXTS[:2]
    assert lambada(engine, TEXTS, tokenizer, limit=2) == lambada(engine, TEXTS[:2], tokenizer)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "found no examples"),
        ('{"text": "a b"}\n{"text": ', "line 2: is not JSON"),
        ('{"txt": "a b"}', "line 1: has no text"),
        ('["a b"]', "line 1: has no text"),
        ('{"text": 3}', "line 1: has no text"),
        ('{"text": "word"}', "line 1: has no last word"),
        ('{"text": "word "}', "line 1: has no last word"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(EvaluationError, match=problem) as caught:
        read_examples(path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_examples(tmp_path / "binary")


def test_lines_beyond_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a b"}\nnot JSON', encoding="utf-8")
    assert read_examples(path, 1) == ["a b"]


def test_logits_that_are_not_finite_are_refused(engine: Engine, tokenizer: Tokenizer) -> None:
    engine._outer["head.weight"][3] = float("nan")
    with pytest.raises(EvaluationError, match="logits are not finite"):
        lambada(engine, TEXTS, tokenizer)
