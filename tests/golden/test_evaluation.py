"""The demo models' figures, frozen from an independent token-by-token evaluation in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.engine.model import Engine
from rwkvq.evaluation.divergence import FLOAT, compare_on_text
from rwkvq.evaluation.lambada import lambada, read_examples
from rwkvq.models.tokenizer import load_tokenizer

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "data" / "demo"
RWKV7, RWKV6 = "rwkv7-9m.pth", "rwkv6-10m.safetensors"
TEXT = {  # the 48 ids of ids.json as 4 windows of 12: nll, standard error
    RWKV7: (4.9882802030195, 0.27390364650210336),
    RWKV6: (5.474930336821473, 0.28360211463680696),
}
KL = {RWKV7: (0.8607173486930886, 0.15962238949931395), RWKV6: (0.8147347844946761, 0.16419009046741306)}
"""KL(reference || the other model) and its standard error, by reference."""
LAMBADA = {  # first 8 examples: ppl, mean log-probability, standard error
    RWKV7: (64387.44884627277, -11.072673999406785, 1.8611575967327794),
    RWKV6: (176207.0330540802, -12.079414906864018, 2.491844228396457),
}


def engine(name: str, dtype: torch.dtype) -> Engine:
    return Engine(open_checkpoint(DEMO / name), dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("reference", "other"), [(RWKV7, RWKV6), (RWKV6, RWKV7)])
def test_text(reference: str, other: str, dtype: torch.dtype, tolerance: float) -> None:
    ids = torch.tensor(json.loads((HERE / "ids.json").read_text())).view(4, 12)
    results = compare_on_text(engine(reference, dtype), {"other": engine(other, dtype)}, ids, batch=3)
    assert (results[FLOAT].nll, results[FLOAT].nll_se) == pytest.approx(TEXT[reference], rel=tolerance)
    assert (results["other"].nll, results["other"].nll_se) == pytest.approx(TEXT[other], rel=tolerance)
    assert (results["other"].kl, results["other"].kl_se) == pytest.approx(KL[reference], rel=tolerance)
    assert results["other"].top1 == 28 / 48
    assert results["other"].ids_sha256 == "dfcd2953727e8b973f5b2977b05af529061d9414cb788a61258d1f8f4a62d051"


@pytest.mark.parametrize("name", [RWKV7, RWKV6])
def test_lambada(name: str) -> None:
    examples = read_examples(DEMO / "lambada.jsonl", 8)
    result = lambada(engine(name, torch.float32), examples, load_tokenizer(DEMO / "tokenizer.json"))
    assert (result.ppl, result.mean_logprob, result.mean_logprob_se) == pytest.approx(LAMBADA[name], rel=1e-4)
    assert (result.acc, result.target_tokens) == (0.0, 16)
