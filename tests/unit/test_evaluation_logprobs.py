from __future__ import annotations

import math

import pytest
import torch

from rwkvq.evaluation.logprobs import score


def reference_scores(p: torch.Tensor, q: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lp, lq = (torch.log_softmax(x.double(), dim=-1) for x in (p, q))
    return lq.gather(1, targets[:, None]).squeeze(1), (lp.exp() * (lp - lq)).sum(-1)


@pytest.mark.parametrize(("tokens", "vocab"), [(1, 3), (7, 50), (5, 70000), (300, 1000)])
def test_equals_the_plain_float64_softmax(tokens: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(0)
    p = 4 * torch.randn(tokens, vocab, generator=generator)
    q = p + 0.5 * torch.randn(tokens, vocab, generator=generator)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    own, other = score([p, q], targets)
    logprob, kl = reference_scores(p, q, targets)
    torch.testing.assert_close(other.logprob, logprob, atol=1e-12, rtol=0)
    assert other.kl is not None
    torch.testing.assert_close(other.kl, kl, atol=1e-12, rtol=0)
    assert torch.equal(other.best, q.argmax(-1))
    torch.testing.assert_close(own.logprob, reference_scores(p, p, targets)[0], atol=1e-12, rtol=0)
    assert own.kl is None


def test_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.zeros(1, 3)
    own, other = score([p, q], torch.tensor([1]))
    assert own.logprob.item() == pytest.approx(math.log(0.25), abs=1e-7)
    assert other.logprob.item() == pytest.approx(-math.log(3), abs=1e-15)
    assert other.kl is not None
    assert other.kl.item() == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75), abs=1e-7)


def test_the_same_logits_have_a_kl_of_exactly_zero() -> None:
    logits = 5 * torch.randn(64, 400, generator=torch.Generator().manual_seed(1))
    result = score([logits, logits.clone(), logits.double()], torch.zeros(64, dtype=torch.int64))
    assert all(item.kl is not None and bool((item.kl == 0).all()) for item in result[1:])


def test_a_constant_added_to_logits_changes_nothing_even_when_exp_overflows() -> None:
    p = torch.randn(4, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q = p.flip(-1)
    targets = torch.tensor([0, 1, 2, 3])
    plain, moved = score([p, q], targets)[1], score([p + 2000, q - 2000], targets)[1]
    assert plain.kl is not None and moved.kl is not None
    torch.testing.assert_close(moved.kl, plain.kl, atol=1e-11, rtol=0)
    torch.testing.assert_close(moved.logprob, plain.logprob, atol=1e-11, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damage_shows_in_the_result(bad: float) -> None:
    logits = torch.zeros(2, 5)
    damaged = logits.clone()
    damaged[1, 3] = bad
    result = score([logits, damaged], torch.tensor([0, 0]))[1]
    assert torch.isfinite(result.logprob).tolist() == [True, False]
