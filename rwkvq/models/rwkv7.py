"""RWKV-7 (x070): one block. Formulas: arXiv 2503.14456; RWKV-LM RWKV-v7/rwkv_v7_demo.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.models.layers import (
    BlockState,
    Observe,
    Weights,
    head_norm,
    layer_norm,
    shift_difference,
    squared_relu,
)
from rwkvq.models.wkv import chunked7, recurrent7

PATHS = "rwkvag"
"""The six token-shifted inputs of the time mix."""
DECAY_SCALE = math.exp(-0.5)
"""ln w = -DECAY_SCALE * sigmoid(.), so w lies in (0.5452, 1)."""
KEY_NORM_EPS = 1e-12
"""Smallest length that a removal key is divided by."""


def run(
    spec: ModelSpec, weights: Weights, x: Tensor, state: BlockState, v_first: Tensor | None, observe: Observe
) -> tuple[Tensor, BlockState, Tensor]:
    """Run x [B, T, D] through one block; returns its output [B, T, D], the state after token T, and v_first [B, T, D].

    v_first is the value projection of block 0; None means that this is block 0.
    """
    normalised = layer_norm(x, weights["ln1.weight"], weights["ln1.bias"])
    mixed, wkv, v_first = _time_mix(spec, weights, normalised, state, v_first, observe)
    x = x + mixed
    normalised_ffn = layer_norm(x, weights["ln2.weight"], weights["ln2.bias"])
    x = x + F.linear(_channel_hidden(weights, normalised_ffn, state, observe), weights["ffn.value.weight"])
    return x, BlockState(normalised[:, -1].clone(), normalised_ffn[:, -1].clone(), wkv), v_first


def observe_only(
    spec: ModelSpec, weights: Weights, x: Tensor, state: BlockState, v_first: Tensor | None, observe: Observe
) -> None:
    """As run, but stop once every site has been observed."""
    normalised = layer_norm(x, weights["ln1.weight"], weights["ln1.bias"])
    x = x + _time_mix(spec, weights, normalised, state, v_first, observe)[0]
    _channel_hidden(weights, layer_norm(x, weights["ln2.weight"], weights["ln2.bias"]), state, observe)


def _low_rank(weights: Weights, path: str, rank: Tensor, observe: Observe) -> Tensor:
    """The second half of a low-rank path: rank [B, T, R] times its factor 2."""
    observe(f"{path}_rank", rank)
    return rank @ weights[f"att.{path}2"]


def _value(weights: Weights, x: Tensor, v_first: Tensor | None, observe: Observe) -> tuple[Tensor, Tensor]:
    """The values [B, T, D], drawn towards those of block 0, and v_first."""
    v = F.linear(x, weights["att.value.weight"])
    if v_first is None:
        return v, v
    draw = torch.sigmoid(weights["att.v0"] + _low_rank(weights, "v", x @ weights["att.v1"], observe))
    return torch.addcmul(v, v_first - v, draw), v_first


def _time_mix(
    spec: ModelSpec, weights: Weights, x: Tensor, state: BlockState, v_first: Tensor | None, observe: Observe
) -> tuple[Tensor, Tensor, Tensor]:
    dx = shift_difference(x, state.att_shift)
    observe("att_dx", dx)
    inputs = {path: torch.addcmul(x, dx, weights[f"att.x_{path}"]) for path in PATHS}
    for path in PATHS:
        observe(f"x{path}", inputs[path])
    r = F.linear(inputs["r"], weights["att.receptance.weight"])
    raw_key = F.linear(inputs["k"], weights["att.key.weight"])
    observe("k_raw", raw_key)
    v, v_first = _value(weights, inputs["v"], v_first, observe)
    decay = weights["att.w0"] + _low_rank(weights, "w", torch.tanh(inputs["w"] @ weights["att.w1"]), observe)
    a = torch.sigmoid(weights["att.a0"] + _low_rank(weights, "a", inputs["a"] @ weights["att.a1"], observe))
    gate = _low_rank(weights, "g", torch.sigmoid(inputs["g"] @ weights["att.g1"]), observe)
    observe("a_minus_1", a - 1)
    k = raw_key * torch.addcmul(torch.ones_like(a), a - 1, weights["att.k_a"])
    r_times_k = r * k
    observe("r_times_k", r_times_k)

    heads = (*x.shape[:2], spec.heads, spec.head_size)
    kk = F.normalize((raw_key * weights["att.k_k"]).view(heads), dim=-1, eps=KEY_NORM_EPS)
    scan = recurrent7 if x.shape[1] == 1 else chunked7
    log_decay = -DECAY_SCALE * torch.sigmoid(decay)
    y, wkv = scan(r.view(heads), k.view(heads), v.view(heads), log_decay.view(heads), kk, a.view(heads), state.wkv)
    bonus = (r_times_k * weights["att.r_k"].reshape(-1)).view(heads).sum(-1, keepdim=True) * v.view(heads)
    gated = (head_norm(y, weights["att.ln_x.weight"], weights["att.ln_x.bias"]) + bonus.flatten(-2)) * gate
    observe("att_output", gated)
    return F.linear(gated, weights["att.output.weight"]), wkv, v_first


def _channel_hidden(weights: Weights, x: Tensor, state: BlockState, observe: Observe) -> Tensor:
    """The input [B, T, F] of ffn.value."""
    dx = shift_difference(x, state.ffn_shift)
    observe("ffn_dx", dx)
    key_input = torch.addcmul(x, dx, weights["ffn.x_k"])
    observe("ffn_key", key_input)
    hidden = squared_relu(F.linear(key_input, weights["ffn.key.weight"]))
    observe("ffn_value", hidden)
    return hidden
