from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from rwkvq.errors import EvaluationError, TokenizerError
from rwkvq.evaluation import harness
from rwkvq.evaluation.harness import TASKS_FOLDER, HarnessModel, with_tasks_folder
from tests.tiny import write_byte_vocabulary, write_tiny


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    model = write_tiny(tmp_path / "model.pth", "x070", vocab=257)
    return {"path": str(model), "tokenizer": str(write_byte_vocabulary(tmp_path / "words.txt"))}


def request(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def test_id_zero_is_prepended_once_or_not_at_all(files: dict[str, str]) -> None:
    model, plain = HarnessModel(**files), HarnessModel(**files, prefix="none")
    assert model._prefixed([4, 5]) == (0, 4, 5)
    assert model._prefixed([0, 5]) == (0, 5)
    assert plain._prefixed([4, 5]) == (4, 5)
    asked = [("", [4, 5], [6])]
    assert model._loglikelihood_tokens(asked) == plain._loglikelihood_tokens([("", [0, 4, 5], [6])])
    assert model._loglikelihood_tokens(asked) != plain._loglikelihood_tokens(asked)


def test_a_rolling_text_is_scored_from_id_zero(files: dict[str, str]) -> None:
    model = HarnessModel(**files)
    whole = model._loglikelihood_tokens([("", [0], model.tok_encode("some text"))])[0][0]
    assert model.loglikelihood_rolling([request("some text")]) == pytest.approx([whole], rel=1e-6)


def test_generation_is_greedy_unless_sampling_is_asked_for(files: dict[str, str]) -> None:
    model = HarnessModel(**files)
    greedy = request("ab", {"max_gen_toks": 6, "until": "\x01\x01", "temperature": 5.0})
    first, second = model.generate_until([greedy, greedy])
    assert first == second
    ids, expected = [0, *model.tok_encode("ab")], []
    for _ in range(6):
        ids.append(int(model.engine.logits(model.engine.hidden(torch.tensor([ids]))[0, -1]).argmax()))
        expected.append(ids[-1])
    assert first == model.text_tokenizer.decode(expected)
    sampled = request("ab", {"max_gen_toks": 6, "do_sample": True, "temperature": 50.0})
    assert model.generate_until([sampled]) != [first]


def test_bad_arguments_are_one_line(files: dict[str, str]) -> None:
    with pytest.raises(EvaluationError, match="prefix: found 'maybe', expected bos or none"):
        HarnessModel(**files, prefix="maybe")
    with pytest.raises(TokenizerError, match="found no tokenizer"):
        HarnessModel(files["path"])


@pytest.mark.parametrize(("given", "expected"), [("8", 8), (4, 4), ("auto", 16), ("auto:4", 16)])
def test_batch_sizes(files: dict[str, str], given: int | str, expected: int) -> None:
    assert HarnessModel(**files, batch_size=given).batch_size == expected


def test_our_tasks_are_on_the_search_path_unless_the_user_names_one() -> None:
    added = ["--include_path", str(TASKS_FOLDER)]
    assert with_tasks_folder(["run", "--tasks", "x"]) == ["run", "--tasks", "x", *added]
    assert with_tasks_folder(["run", "--include_path=mine"]) == ["run", "--include_path=mine"]
    assert with_tasks_folder(["run", "--include_path", "mine"]) == ["run", "--include_path", "mine"]
    for other in (["ls", "tasks"], ["validate"], ["--help"], []):
        assert with_tasks_folder(other) == other


def test_arguments_are_restored_after_the_command_line() -> None:
    before = sys.argv
    with pytest.raises(SystemExit), harness._arguments(["x", "run"]):
        assert sys.argv == ["x", "run"]
        raise SystemExit
    assert sys.argv is before


def test_the_local_task_needs_a_file() -> None:
    with pytest.raises(EvaluationError, match="no file given; add --metadata lambada=FILE"):
        harness.lambada_dataset(path="model.pth")


def test_the_shipped_task_reads_through_a_function_that_exists() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    task = yaml.load((TASKS_FOLDER / "lambada_local.yaml").read_text(), Loader)
    module, _, name = task["custom_dataset"].rpartition(".")
    assert getattr(sys.modules[module], name) is harness.lambada_dataset


def test_a_missing_harness_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(EvaluationError, match=r"pip install 'rwkvq\[eval\]'"):
        harness.model_class.__wrapped__()  # past the cache: another test may have registered the model
