from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.engine import generate as generation
from rwkvq.engine.generate import (
    continue_text,
    draw,
    generate,
    generate_text,
    sample_ids,
    sample_texts,
    write_samples,
)
from rwkvq.engine.model import Engine
from rwkvq.errors import SettingsError
from rwkvq.models.tokenizer import load_tokenizer
from tests.tiny import write_byte_vocabulary, write_tiny


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    # ids 257 to 319 are no bytes: a vocabulary of 257 keeps every sample decodable
    return Engine(open_checkpoint(write_tiny(tmp_path / "model.pth", "x070", vocab=257)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_draw_inverts_the_cumulative_distribution() -> None:
    # probabilities 0.2, 0.5, 0.3: falling order is token 1 up to 0.5, token 2 up to 0.8, token 0
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(6, 3)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms, temperature=1.0, top_p=1.0).tolist() == [1, 1, 2, 2, 0, 0]


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(3, 3)
    uniforms = torch.tensor([0.6, 0.65, 1 - 2**-53], dtype=torch.float64)
    # 0.5 + 0.3 reaches 0.7; renormalised, token 1 ends at 0.625
    assert draw(logits, uniforms, temperature=1.0, top_p=0.7).tolist() == [1, 2, 2]
    assert draw(logits, uniforms, temperature=1.0, top_p=0.4).tolist() == [1, 1, 1]


def test_temperature_zero_is_greedy_and_a_high_one_is_flat() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    uniform = torch.tensor([0.99], dtype=torch.float64)
    assert draw(logits, uniform, temperature=0.0, top_p=1.0).tolist() == [1]
    assert draw(logits, uniform, temperature=1e6, top_p=1.0).tolist() == [0]


def test_draw_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]])
    uniforms = torch.rand(5000, dtype=torch.float64, generator=seeded())
    drawn = draw(logits.expand(5000, 4), uniforms, temperature=0.7, top_p=1.0)
    share = torch.bincount(drawn, minlength=4) / 5000
    torch.testing.assert_close(share, torch.softmax(logits[0] / 0.7, -1), atol=0.03, rtol=0)


def test_greedy_generation_equals_recomputing_the_whole_text(engine: Engine) -> None:
    prompt = [5, 6, 7]
    generated = generate(engine, prompt, tokens=8, temperature=0.0, top_p=1.0, generator=seeded())
    row = [0, *prompt]
    for token in generated:
        assert int(engine.logits(engine.hidden(torch.tensor([row]))[0, -1]).argmax()) == token
        row.append(token)
    assert generated


def test_generation_is_seeded(engine: Engine) -> None:
    def ids(seed: int) -> list[int]:
        return generate(engine, [1], tokens=20, temperature=1.0, top_p=1.0, generator=seeded(seed))

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_id_zero_ends_a_text_and_is_left_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "stream", lambda *_, **__: iter([4, 5, 0, 6]))
    assert generate(engine, [], tokens=9, temperature=0.0, top_p=1.0, generator=seeded()) == [4, 5]


def test_text_ends_before_the_first_stop_string(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(write_byte_vocabulary(tmp_path / "words.txt"))
    ids = tokenizer.encode("one two three")
    monkeypatch.setattr(generation, "stream", lambda *_, **__: iter(ids))
    options = {"tokens": 13, "temperature": 0.0, "top_p": 1.0, "generator": seeded()}
    assert generate_text(engine, tokenizer, "", until=["three", " two"], **options) == "one"
    assert generate_text(engine, tokenizer, "", **options) == "one two three"


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (1.0, 0.0), (float("nan"), 1.0), (1.0, 1.5)])
def test_sampling_settings_are_checked(engine: Engine, temperature: float, top_p: float) -> None:
    with pytest.raises(SettingsError, match="expected a number"):
        generate(engine, [1], tokens=1, temperature=temperature, top_p=top_p, generator=seeded())


def test_sampled_rows_do_not_depend_on_their_neighbours(engine: Engine) -> None:
    uniforms = torch.rand(3, 12, dtype=torch.float64, generator=seeded(3))
    together = sample_ids(engine, uniforms, temperature=1.0, top_p=0.95)
    alone = torch.cat([sample_ids(engine, row[None], temperature=1.0, top_p=0.95) for row in uniforms])
    assert torch.equal(together, alone)
    assert len(set(together.flatten().tolist())) > 5


def test_texts_are_joined_where_the_model_ends_one(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(write_byte_vocabulary(tmp_path / "words.txt"))
    rows = torch.tensor([[0, *tokenizer.encode("ab"), 0, 0, *tokenizer.encode("c")]])
    monkeypatch.setattr(generation, "sample_ids", lambda *_, **__: rows)
    assert sample_texts(engine, tokenizer, texts=1, tokens=6, generator=seeded()) == ["ab\n\nc"]


def test_files_of_samples_and_continuations_are_seeded(engine: Engine, tmp_path: Path) -> None:
    words = write_byte_vocabulary(tmp_path / "words.txt")
    options = {"tokens": 5, "temperature": 1.0, "top_p": 0.9, "seed": 4}
    contents = []
    for name in ("a.jsonl", "b.jsonl"):
        write_samples(engine.source.path, words, tmp_path / name, samples=3, **options)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    assert [list(json.loads(line)) for line in contents[0].splitlines()] == [["text"]] * 3
    assert continue_text(engine.source.path, words, "ab", **options) == continue_text(
        engine.source.path, words, "ab", **options
    )
