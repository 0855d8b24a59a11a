"""The WKV recurrences on small cases that can be worked out by hand, and their edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkvq.models import wkv


def _column(*values: float) -> Tensor:
    """[1, T, 1, 1] float64."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)


@pytest.mark.parametrize("scan", [wkv.recurrent6, wkv.chunked6])
def test_x060_by_hand(scan: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """One channel, w = 1/2, u = 3, S0 = 8: y1 = 1 (8 + 3*1*2) = 14, S = 4 + 2 = 6; y2 = 2 (6 + 3*1*5) = 42, S = 8."""
    y, state = scan(
        _column(1, 2),
        _column(1, 1),
        _column(2, 5),
        _column(math.log(0.5), math.log(0.5)),
        torch.tensor([[3.0]], dtype=torch.float64),
        torch.full((1, 1, 1, 1), 8.0, dtype=torch.float64),
    )
    torch.testing.assert_close(y.flatten(), torch.tensor([14.0, 42.0], dtype=torch.float64))
    assert state.item() == pytest.approx(8.0)


@pytest.mark.parametrize("scan", [wkv.recurrent7, wkv.chunked7])
def test_x070_by_hand(scan: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """One channel, w = 1/2, kk = 1, a = 1/4, S0 = 8: S = 4 - 2 + 2 = 4, y1 = 4; S = 2 - 1 + 5 = 6, y2 = 12."""
    half = _column(math.log(0.5), math.log(0.5))
    y, state = scan(
        _column(1, 2),
        _column(1, 1),
        _column(2, 5),
        half,
        _column(1, 1),
        _column(0.25, 0.25),
        torch.full((1, 1, 1, 1), 8.0, dtype=torch.float64),
    )
    torch.testing.assert_close(y.flatten(), torch.tensor([4.0, 12.0], dtype=torch.float64))
    assert state.item() == pytest.approx(6.0)


def test_state_layouts() -> None:
    """After one token from zero the state is key x value in x060 and value x key in x070."""
    key, value = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    one = [x.reshape(1, 1, 1, 2) for x in (torch.ones(2), key, value, torch.zeros(2))]
    zero = torch.zeros(1, 1, 2, 2)
    for scan6, scan7 in ((wkv.recurrent6, wkv.recurrent7), (wkv.chunked6, wkv.chunked7)):
        assert torch.equal(scan6(*one, torch.zeros(1, 2), zero)[1][0, 0], torch.outer(key, value))
        assert torch.equal(scan7(*one, one[3], one[3], zero)[1][0, 0], torch.outer(value, key))


def test_decay_of_minus_infinity_forgets() -> None:
    generator = torch.Generator().manual_seed(0)
    r, k, v = (torch.randn(1, 40, 1, 4, generator=generator) for _ in range(3))
    log_decay = torch.full_like(r, -math.inf)
    state = torch.randn(1, 1, 4, 4, generator=generator)
    u = torch.zeros(1, 4)
    for scan in (wkv.recurrent6, wkv.chunked6):
        y, last = scan(r, k, v, log_decay, u, state)
        torch.testing.assert_close(y[:, 0], (r[:, 0].unsqueeze(-2) @ state).squeeze(-2))
        # token t sees token t - 1 alone
        torch.testing.assert_close(y[:, 1:], (r[:, 1:] * k[:, :-1]).sum(-1, keepdim=True) * v[:, :-1])
        torch.testing.assert_close(last[0, 0], torch.outer(k[0, -1, 0], v[0, -1, 0]))


@pytest.mark.parametrize("time", [1, 2, 3, 31, 32, 33, 64, 65])
def test_chunk_is_a_power_of_two_up_to_32(time: int) -> None:
    chunk = wkv._chunk_length(time)
    assert chunk.bit_count() == 1 and min(time, 32) <= chunk <= 32
