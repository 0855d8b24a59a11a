"""lm-eval runs our model, and its LAMBADA is ours. Skipped where lm-eval is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rwkvq.evaluation.harness import TASKS_FOLDER, model_class
from rwkvq.evaluation.lambada import LambadaResult, lambada, read_examples
from tests.tiny import write_byte_vocabulary, write_tiny

pytest.importorskip("lm_eval")

TEXTS = [
    "It was a cold morning and the old man had lost his coat",
    'He looked at her. "You know," he said, "I was never a sailor',
    "first line\n\nsecond line, and then the third",
    "Über den Dächern sah man den Mond",
    "one two",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def run_harness(lm: Any, data: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    # with the bundled tasks the index alone takes 15 s
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata={"lambada": str(data)})
    found = evaluator.evaluate(lm=lm, task_dict=manager.load(["lambada_local"]), bootstrap_iters=0, log_samples=True)
    return found["results"]["lambada_local"], found["samples"]["lambada_local"]


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_lambada_is_the_same_in_the_harness(tmp_path: Path, data: Path, version: str) -> None:
    model = write_tiny(tmp_path / "model.safetensors", version)
    words = write_byte_vocabulary(tmp_path / "words.txt")
    lm = model_class().create_from_arg_obj(
        {"path": str(model), "tokenizer": str(words)}, {"batch_size": 2, "max_batch_size": None, "device": None}
    )
    figures, samples = run_harness(lm, data)
    ours: LambadaResult = lambada(lm.engine, read_examples(data), lm.text_tokenizer, batch=3)
    logprobs = [sample["filtered_resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    assert logprobs == pytest.approx(ours.logprobs, rel=1e-6)
    assert figures["perplexity,none"] == pytest.approx(ours.ppl, rel=1e-6)
    assert figures["acc,none"] == ours.acc


def test_our_model_is_in_the_registry() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("rwkvq") is model_class()
