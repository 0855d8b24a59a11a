from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.engine.model import Engine
from rwkvq.errors import EvaluationError
from rwkvq.evaluation.divergence import FLOAT, POSITION_BUCKETS, compare_on_text
from tests.tiny import tiny_tensors, write_tensors, write_tiny


def perturbed(path: Path, version: str, amount: float) -> Path:
    generator = torch.Generator().manual_seed(9)
    tensors = tiny_tensors(version, seed=0, dtype=torch.float32)
    moved = {name: value + amount * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    return write_tensors(path, moved)


@pytest.fixture(params=["x060", "x070"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Engine, Engine]:
    first = write_tiny(tmp_path / "first.safetensors", request.param, dtype=torch.float32)
    second = perturbed(tmp_path / "second.safetensors", request.param, 0.02)
    return Engine(open_checkpoint(first)), Engine(open_checkpoint(second))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 320, (5, 20), generator=torch.Generator().manual_seed(3))


def plain_columns(engines: tuple[Engine, Engine], ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """nll of both, KL and agreement by token, each window by itself, straight from the definitions."""
    inputs = torch.cat([torch.zeros(len(ids), 1, dtype=torch.int64), ids[:, :-1]], dim=1)
    lp, lq = (torch.log_softmax(engine.logits(engine.hidden(inputs)).double(), dim=-1) for engine in engines)
    nll, nll_other = (-x.gather(2, ids[..., None]).squeeze(2) for x in (lp, lq))
    return nll, nll_other, (lp.exp() * (lp - lq)).sum(-1), (lp.argmax(-1) == lq.argmax(-1)).double()


def test_figures_equal_their_definitions(pair: tuple[Engine, Engine], ids: torch.Tensor) -> None:
    results = compare_on_text(pair[0], {"other": pair[1]}, ids, batch=2)
    nll, nll_other, kl, same = plain_columns(pair, ids)
    own, other = results[FLOAT], results["other"]
    assert own.nll == pytest.approx(nll.mean().item(), rel=1e-6)
    assert own.ppl == pytest.approx(math.exp(own.nll), rel=1e-12)
    assert other.nll == pytest.approx(nll_other.mean().item(), rel=1e-6)
    assert other.kl == pytest.approx(kl.mean().item(), rel=1e-4) and other.kl > 1e-3
    assert other.kl_p99 == pytest.approx(np.quantile(kl.numpy(), 0.99), rel=1e-4)
    assert other.top1 == same.mean().item() and 0 < other.top1 < 1
    assert other.predictions == 100
    windows = torch.tensor(other.window_kl)
    assert other.kl_se == pytest.approx(windows.std().item() / math.sqrt(5), rel=1e-5)
    delta = (nll_other - nll).mean(1)
    assert other.delta_nll == pytest.approx(delta.mean().item(), rel=1e-3)
    assert other.delta_nll_se == pytest.approx(delta.std().item() / math.sqrt(5), rel=1e-3)


def test_the_reference_has_no_kl_and_runs_alone_for_plain_perplexity(
    pair: tuple[Engine, Engine], ids: torch.Tensor
) -> None:
    alone = compare_on_text(pair[0], {}, ids)
    assert list(alone) == [FLOAT]
    assert alone[FLOAT].kl is None and alone[FLOAT].top1 is None and alone[FLOAT].delta_nll is None
    assert alone[FLOAT] == compare_on_text(pair[0], {"other": pair[1]}, ids)[FLOAT]


def test_a_model_against_itself(pair: tuple[Engine, Engine], ids: torch.Tensor) -> None:
    other = compare_on_text(pair[0], {"same": pair[0]}, ids)["same"]
    assert (other.kl, other.kl_p99, other.top1, other.delta_nll) == (0.0, 0.0, 1.0, 0.0)


def test_the_batch_changes_nothing_beyond_rounding(pair: tuple[Engine, Engine], ids: torch.Tensor) -> None:
    one, all_at_once = (compare_on_text(pair[0], {"other": pair[1]}, ids, batch=size)["other"] for size in (1, 8))
    assert one.nll == pytest.approx(all_at_once.nll, rel=1e-6)
    assert one.window_kl == pytest.approx(all_at_once.window_kl, rel=1e-4)


def test_windows_start_from_a_zero_state(pair: tuple[Engine, Engine], ids: torch.Tensor) -> None:
    whole = compare_on_text(pair[0], {}, ids)[FLOAT].window_nll
    assert whole[3] == pytest.approx(compare_on_text(pair[0], {}, ids[3:4])[FLOAT].nll, rel=1e-6)


def test_rows_buckets_json_and_progress(pair: tuple[Engine, Engine], ids: torch.Tensor) -> None:
    seen: list[tuple[str, int, int]] = []
    results = compare_on_text(pair[0], {"other": pair[1]}, ids, batch=2, on_batch=lambda *item: seen.append(item))
    other = results["other"]
    assert seen == [("windows", 2, 5), ("windows", 4, 5), ("windows", 5, 5)]
    assert other.kl_by_position is not None and len(other.kl_by_position) == POSITION_BUCKETS
    sizes = torch.tensor([len(part) for part in torch.arange(20).tensor_split(POSITION_BUCKETS)])
    assert (torch.tensor(other.kl_by_position) * sizes).sum().item() / 20 == pytest.approx(other.kl, rel=1e-6)
    rows = other.window_rows()
    assert [row["window"] for row in rows] == list(range(5))
    assert sum(row["kl"] for row in rows if row["kl"] is not None) / 5 == pytest.approx(other.kl, rel=1e-12)
    assert results[FLOAT].window_rows()[0]["kl"] is None
    assert "window_nll" not in other.to_json() and other.to_json()["kl"] == other.kl


def test_a_single_window_has_no_standard_error(pair: tuple[Engine, Engine], ids: torch.Tensor) -> None:
    other = compare_on_text(pair[0], {"other": pair[1]}, ids[:1])["other"]
    assert other.nll_se is None and other.ppl_se is None and other.kl_se is None


def test_different_vocabularies_are_refused(pair: tuple[Engine, Engine], ids: torch.Tensor, tmp_path: Path) -> None:
    other = Engine(open_checkpoint(write_tiny(tmp_path / "large.pth", "x070", vocab=330)))
    with pytest.raises(EvaluationError, match=r"vocabularies differ: .* has 320, .* has 330"):
        compare_on_text(pair[0], {"other": other}, ids)


def test_logits_that_are_not_finite_name_the_model(pair: tuple[Engine, Engine], ids: torch.Tensor) -> None:
    pair[1]._outer["head.weight"][7] = float("nan")
    with pytest.raises(EvaluationError, match=r"second\.safetensors: logits are not finite"):
        compare_on_text(pair[0], {"other": pair[1]}, ids)
