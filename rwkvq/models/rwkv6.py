"""RWKV-6 (x060): one block. Formulas: arXiv 2404.05892; RWKV-LM RWKV-v5/rwkv_v6_demo.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvq.checkpoint.names import MIX_ORDER
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
from rwkvq.models.wkv import chunked6, recurrent6


def run(spec: ModelSpec, weights: Weights, x: Tensor, state: BlockState, observe: Observe) -> tuple[Tensor, BlockState]:
    """Run x [B, T, D] through one block; returns the block's output [B, T, D] and the state after token T."""
    normalised = layer_norm(x, weights["ln1.weight"], weights["ln1.bias"])
    mixed, wkv = _time_mix(spec, weights, normalised, state, observe)
    x = x + mixed
    normalised_ffn = layer_norm(x, weights["ln2.weight"], weights["ln2.bias"])
    hidden, gate_input = _channel_inputs(weights, normalised_ffn, state, observe)
    gate = torch.sigmoid(F.linear(gate_input, weights["ffn.receptance.weight"]))
    x = x + gate * F.linear(hidden, weights["ffn.value.weight"])
    return x, BlockState(normalised[:, -1].clone(), normalised_ffn[:, -1].clone(), wkv)


def observe_only(spec: ModelSpec, weights: Weights, x: Tensor, state: BlockState, observe: Observe) -> None:
    """As run, but stop once every site has been observed."""
    normalised = layer_norm(x, weights["ln1.weight"], weights["ln1.bias"])
    x = x + _time_mix(spec, weights, normalised, state, observe)[0]
    _channel_inputs(weights, layer_norm(x, weights["ln2.weight"], weights["ln2.bias"]), state, observe)


def _mixed_inputs(weights: Weights, x: Tensor, last: Tensor, observe: Observe) -> dict[str, Tensor]:
    """The inputs [B, T, D] of the five paths w, k, v, r, g: a data-dependent lerp with the token before."""
    dx = shift_difference(x, last)
    observe("att_dx", dx)
    z = torch.addcmul(x, dx, weights["att.time_maa_x"])
    observe("maa_z", z)
    ranks = torch.tanh(z @ weights["att.time_maa_w1"]).chunk(len(MIX_ORDER), dim=-1)
    inputs = {}
    for path, rank, spread in zip(MIX_ORDER, ranks, weights["att.time_maa_w2"], strict=True):
        observe(f"maa_rank_{path}", rank)
        inputs[path] = torch.addcmul(x, dx, rank @ spread + weights[f"att.time_maa_{path}"])
    return inputs


def _time_mix(
    spec: ModelSpec, weights: Weights, x: Tensor, state: BlockState, observe: Observe
) -> tuple[Tensor, Tensor]:
    inputs = _mixed_inputs(weights, x, state.att_shift, observe)
    for path in MIX_ORDER:
        observe(f"x{path}", inputs[path])
    rank = torch.tanh(inputs["w"] @ weights["att.time_decay_w1"])
    observe("decay_rank", rank)
    # the logarithm of the decay directly: exp(-exp(.)) underflows to 0, whose logarithm would be lost
    log_decay = -torch.exp(weights["att.time_decay"] + rank @ weights["att.time_decay_w2"])
    heads = (*x.shape[:2], spec.heads, spec.head_size)
    r = F.linear(inputs["r"], weights["att.receptance.weight"]).view(heads)
    k = F.linear(inputs["k"], weights["att.key.weight"]).view(heads)
    v = F.linear(inputs["v"], weights["att.value.weight"]).view(heads)
    gate = F.silu(F.linear(inputs["g"], weights["att.gate.weight"]))
    scan = recurrent6 if x.shape[1] == 1 else chunked6
    bonus = weights["att.time_faaaa"].view(spec.heads, spec.head_size)
    y, wkv = scan(r, k, v, log_decay.view(heads), bonus, state.wkv)
    gated = head_norm(y, weights["att.ln_x.weight"], weights["att.ln_x.bias"]) * gate
    observe("att_output", gated)
    return F.linear(gated, weights["att.output.weight"]), wkv


def _channel_inputs(weights: Weights, x: Tensor, state: BlockState, observe: Observe) -> tuple[Tensor, Tensor]:
    """The inputs of ffn.value [B, T, F] and of ffn.receptance [B, T, D]."""
    dx = shift_difference(x, state.ffn_shift)
    observe("ffn_dx", dx)
    key_input = torch.addcmul(x, dx, weights["ffn.time_maa_k"])
    observe("ffn_key", key_input)
    receptance_input = torch.addcmul(x, dx, weights["ffn.time_maa_r"])
    observe("ffn_receptance", receptance_input)
    hidden = squared_relu(F.linear(key_input, weights["ffn.key.weight"]))
    observe("ffn_value", hidden)
    return hidden, receptance_input
