from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path

import pytest
import torch

from rwkvq.errors import TextError
from rwkvq.evaluation.perplexity import Estimate, estimate, ids_sha256, perplexity, text_windows
from rwkvq.models.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import write_byte_vocabulary


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_byte_vocabulary(tmp_path / "words.txt"))


def test_windows_are_consecutive_and_the_incomplete_last_one_is_dropped(tokenizer: Tokenizer) -> None:
    ids = text_windows("abcdefgh", tokenizer, 64, 3, where="text")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[98, 99, 100], [101, 102, 103]]
    assert text_windows("abcdefgh", tokenizer, 1, 3, where="text").tolist() == [[98, 99, 100]]


def test_too_short_a_text_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(TextError, match=r"short\.txt: found 2 tokens, one window needs 3"):
        text_windows("ab", tokenizer, 1, 3, where="short.txt")


def test_mean_and_standard_error() -> None:
    result = estimate(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
    assert result.mean == 3.0
    assert result.se == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3) / 2, abs=1e-15)
    assert estimate(torch.tensor([2.0])) == Estimate(2.0, None)


def test_perplexity_of_a_ruined_model_is_a_number() -> None:
    assert perplexity(math.log(40)) == pytest.approx(40)
    assert perplexity(1e6) == math.exp(700)


def test_ids_are_hashed_as_little_endian_int32() -> None:
    expected = hashlib.sha256(struct.pack("<4i", 1, 2, 3, 70000)).hexdigest()
    assert ids_sha256(torch.tensor([[1, 2], [3, 70000]])) == expected
