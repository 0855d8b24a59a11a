from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from rwkvq.checkpoint.reader import WeightSource, open_checkpoint
from rwkvq.engine import model
from rwkvq.engine.model import Engine, is_artifact, open_model, open_tokenizer
from rwkvq.errors import ArtifactError, EvaluationError, TokenizerError
from rwkvq.models import load_block
from tests.tiny import write_byte_vocabulary, write_tiny

VERSIONS = ["x060", "x070"]


@pytest.fixture(params=VERSIONS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model.safetensors", request.param)


def random_ids(batch: int, time: int) -> torch.Tensor:
    return torch.randint(0, 320, (batch, time), generator=torch.Generator().manual_seed(1))


def test_recurrent_steps_equal_sequence_mode(path: Path) -> None:
    engine = Engine(open_checkpoint(path))
    ids = random_ids(2, 45)
    expected = engine.logits(engine.hidden(ids))
    state, steps = engine.initial_state(2), []
    for position in range(ids.shape[1]):
        logits, state = engine.forward(ids[:, position : position + 1], state)
        steps.append(logits)
    assert expected.std() > 0.1  # a model that ignores its input would pass everything
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=0)


def test_a_text_continued_from_its_state_equals_the_text_at_once(path: Path) -> None:
    engine = Engine(open_checkpoint(path))
    ids = random_ids(3, 70)
    first, state = engine.run(ids[:, :33], None)
    second, _ = engine.run(ids[:, 33:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), engine.hidden(ids), atol=1e-4, rtol=0)


def test_one_block_at_a_time_gives_the_same_bytes(path: Path) -> None:
    source = open_checkpoint(path)
    ids = random_ids(2, 9)
    assert torch.equal(Engine(source).hidden(ids), Engine(source, resident=False).hidden(ids))


def test_only_a_resident_engine_keeps_blocks(path: Path) -> None:
    source = open_checkpoint(path)
    counts = []
    for resident in (True, False):
        engine = Engine(source, resident=resident)
        engine.hidden(random_ids(1, 2))
        counts.append(len(engine._blocks))
    assert counts == [2, 0]


def test_float64_agrees_with_float32_and_stays_float64(path: Path) -> None:
    source = open_checkpoint(path)
    ids = random_ids(1, 40)
    wide = Engine(source, dtype=torch.float64)
    logits = wide.logits(wide.hidden(ids))
    assert logits.dtype == torch.float64
    narrow = Engine(source)
    torch.testing.assert_close(narrow.logits(narrow.hidden(ids)).double(), logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("wrong", [320, -1])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, wrong: int) -> None:
    engine = Engine(open_checkpoint(write_tiny(tmp_path / "m.pth", "x070")))
    with pytest.raises(EvaluationError, match=f"token id {wrong} is outside the vocabulary of 320"):
        engine.hidden(torch.tensor([[0, wrong]]))


def test_a_folder_with_any_file_of_an_artifact_is_opened_as_one(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("")
    assert is_artifact(tmp_path)
    with pytest.raises(ArtifactError):
        open_model(tmp_path)


def test_the_tokenizer_inside_the_folder_is_the_default(tmp_path: Path) -> None:
    spec = open_checkpoint(write_tiny(tmp_path / "m.pth", "x060")).spec
    with pytest.raises(TokenizerError, match="found no tokenizer"):
        open_tokenizer(tmp_path, None, spec)
    write_byte_vocabulary(tmp_path / "tokenizer.txt")
    assert open_tokenizer(tmp_path, None, spec).encode("ab") == [98, 99]


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    spec = open_checkpoint(write_tiny(tmp_path / "m.pth", "x060", vocab=100)).spec
    with pytest.raises(TokenizerError):
        open_tokenizer(tmp_path, write_byte_vocabulary(tmp_path / "words.txt"), spec)


def test_many_batches_through_one_block_after_the_other_give_the_same_bytes(path: Path) -> None:
    source = open_checkpoint(path)
    batches = [random_ids(2, 40), random_ids(1, 9), random_ids(3, 33)]
    resident = Engine(source)
    for engine in (resident, Engine(source, resident=False)):
        for workers in (1, 2):
            found = engine.hidden_of(batches, workers)
            assert all(torch.equal(x, resident.hidden(ids)) for x, ids in zip(found, batches, strict=True))


def test_a_streaming_engine_loads_each_block_once_for_all_batches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(source: WeightSource, index: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        loaded.append(index)
        return load_block(source, index, dtype)

    monkeypatch.setattr(model, "load_block", load)
    Engine(open_checkpoint(path), resident=False).hidden_of([random_ids(2, 9)] * 5)
    assert loaded == [0, 1]


@pytest.mark.parametrize("rows", [64, 100, 320])
def test_logits_in_slices_of_the_vocabulary_are_the_same_bytes(
    path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    source = open_checkpoint(path)
    resident, streaming = Engine(source), Engine(source, resident=False)
    hidden = resident.hidden(random_ids(2, 20))
    monkeypatch.setattr(model, "_HEAD_ROWS", rows)
    torch.testing.assert_close(streaming.logits(hidden), resident.logits(hidden), rtol=1e-6, atol=1e-6)
    monkeypatch.undo()
    assert torch.equal(streaming.logits(hidden), resident.logits(hidden))


def test_a_streaming_engine_lets_go_of_its_head(path: Path) -> None:
    engine = Engine(open_checkpoint(path), resident=False)
    hidden = engine.hidden(random_ids(1, 3))
    assert not engine._outer
    engine.logits(hidden)
    assert list(engine._outer) == ["head.weight"] and engine._outer["head.weight"].dtype == torch.bfloat16
    engine.hidden_of([random_ids(1, 3)])
    assert not engine._outer


def test_a_block_is_gone_when_the_next_is_loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def load(source: WeightSource, index: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        assert not any(tensor() is not None for tensor in alive), index
        weights = load_block(source, index, dtype)
        alive[:] = [weakref.ref(tensor) for tensor in weights.values()]
        return weights

    engine = Engine(open_checkpoint(path), resident=False)
    monkeypatch.setattr(model, "load_block", load)
    engine.hidden_of([random_ids(1, 3), random_ids(2, 4)], workers=2)
    assert alive
