"""Chunked and recurrent WKV agree, whatever the length, the decay and the alignment of keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkvq.models import wkv

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
"""Largest allowed difference, relative to the root mean square of the outputs."""
DTYPES = tuple(TOLERANCE)
Inputs = dict[str, Tensor]


def _inputs(seed: int, *, batch: int = 2, time: int = 100, heads: int = 2, size: int = 16) -> Inputs:
    """Float64 inputs like a model's: r, k, v, log_decay, kk, a [B, T, H, N], u [H, N], state [B, H, N, N]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, time, heads, size)
    k, a = normal(*shape), torch.sigmoid(normal(*shape))
    return {
        "r": normal(*shape),
        "k": k,
        "v": normal(*shape),
        "log_decay": -0.606531 * torch.sigmoid(3 * normal(*shape) - 1),
        "kk": F.normalize(k, dim=-1),
        "a": a,
        "u": normal(heads, size),
        "state": normal(batch, heads, size, size),
    }


def _run(version: str, form: str, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scan = {
        ("x060", "recurrent"): wkv.recurrent6,
        ("x060", "chunked"): wkv.chunked6,
        ("x070", "recurrent"): wkv.recurrent7,
        ("x070", "chunked"): wkv.chunked7,
    }[version, form]
    names = ("r", "k", "v", "log_decay") + (("u",) if version == "x060" else ("kk", "a")) + ("state",)
    y, state = scan(*(inputs[name].to(dtype) for name in names))
    return y.double(), state.double()


def _assert_agree(version: str, inputs: Inputs, dtype: torch.dtype) -> None:
    """The chunked form in `dtype` against the recurrence in float64."""
    y, state = _run(version, "recurrent", inputs, torch.float64)
    found_y, found_state = _run(version, "chunked", inputs, dtype)
    for found, expected in ((found_y, y), (found_state, state)):
        scale = expected.square().mean().sqrt()
        assert (found - expected).abs().max() <= TOLERANCE[dtype] * scale + 1e-30


@pytest.mark.parametrize("version", ["x060", "x070"])
@given(seed=st.integers(0, 2**31 - 1), time=st.integers(1, 140), batch=st.integers(1, 3), dtype=st.sampled_from(DTYPES))
@settings(max_examples=25, deadline=None)
def test_any_length(version: str, seed: int, time: int, batch: int, dtype: torch.dtype) -> None:
    _assert_agree(version, _inputs(seed, batch=batch, time=time), dtype)


@pytest.mark.parametrize("version", ["x060", "x070"])
@given(seed=st.integers(0, 2**31 - 1), cut=st.integers(1, 99))
@settings(max_examples=15, deadline=None)
def test_state_carries_over_any_cut(version: str, seed: int, cut: int) -> None:
    inputs = _inputs(seed)
    whole, last = _run(version, "chunked", inputs, torch.float64)
    fixed = {"u", "state"}
    first = {name: x if name in fixed else x[:, :cut] for name, x in inputs.items()}
    y1, between = _run(version, "chunked", first, torch.float64)
    second = {name: x if name in fixed else x[:, cut:] for name, x in inputs.items()} | {"state": between}
    y2, end = _run(version, "chunked", second, torch.float64)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(end, last, rtol=0, atol=1e-10)


def _set(inputs: Inputs, **changes: Tensor) -> Inputs:
    return inputs | changes


def _aligned_keys(inputs: Inputs) -> Inputs:
    """kk nearly identical for all tokens, a near 1: repeated squaring of the triangular matrix overflows here."""
    kk = F.normalize(inputs["kk"][:, :1] + 1e-3 * inputs["kk"], dim=-1)
    return _set(inputs, kk=kk, a=torch.full_like(kk, 0.999), log_decay=torch.full_like(kk, -1e-4))


NASTY: dict[str, tuple[str, Callable[[Inputs], Inputs]]] = {
    "x070 maximum decay": ("x070", lambda x: _set(x, log_decay=torch.full_like(x["r"], -0.606531))),
    "x070 hardly any decay": ("x070", lambda x: _set(x, log_decay=torch.full_like(x["r"], -1e-4))),
    "x070 half and half": ("x070", lambda x: _set(x, log_decay=_halves(x["r"], -0.606531, 0.0))),
    "x070 aligned keys": ("x070", _aligned_keys),
    "x060 l = -20": ("x060", lambda x: _set(x, log_decay=torch.full_like(x["r"], -20.0))),
    "x060 l = -3e4": ("x060", lambda x: _set(x, log_decay=torch.full_like(x["r"], -3e4))),
    "x060 slow": ("x060", lambda x: _set(x, log_decay=torch.full_like(x["r"], -1e-4))),
    "x060 half and half": ("x060", lambda x: _set(x, log_decay=_halves(x["r"], -80.0, 0.0))),
}


def _halves(like: Tensor, low: float, high: float) -> Tensor:
    """`low` in the even channels, `high` in the odd ones."""
    return torch.tensor([low, high], dtype=like.dtype).repeat(like.shape[-1] // 2).expand(like.shape).clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NASTY)
def test_nasty_cases(case: str, dtype: torch.dtype) -> None:
    version, change = NASTY[case]
    _assert_agree(version, change(_inputs(7, batch=1, time=300, size=64)), dtype)
