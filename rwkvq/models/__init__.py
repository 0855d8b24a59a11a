"""RWKV-6 and RWKV-7, block by block: pure functions of weights, input and state.

A model is embed, then run_block for every block, then final_norm, then a product with head.weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from rwkvq.checkpoint.reader import WeightSource
from rwkvq.checkpoint.spec import ModelSpec, Version
from rwkvq.device import CPU
from rwkvq.models import rwkv6, rwkv7
from rwkvq.models.layers import BlockState, Observe, Weights, layer_norm, no_observe

__all__ = [
    "BlockState",
    "Observe",
    "batches_at_once",
    "embed",
    "final_norm",
    "fitting_batch",
    "load_block",
    "observe_block",
    "run_block",
    "run_block_with_graph",
]


BATCHES_BYTES = 1280 << 20
"""What all batches that run through a block at once may take beside its weights."""
BATCH_BYTES = 256 << 20
"""What one batch of several sequences may take."""
_STATES: Mapping[Version, int] = {"x060": 24, "x070": 40}
"""Tensors [tokens, width] that live at once while a batch runs through a block, at most (measured)."""


def _batch_bytes(spec: ModelSpec, tokens: int) -> int:
    return 4 * tokens * (_STATES[spec.version] * spec.width + 3 * spec.ffn)


def fitting_batch(spec: ModelSpec, length: int, batch: int) -> int:
    """How many sequences of `length` tokens run through a block together: `batch`, fewer if the model is wide.

    It depends on nothing but the arguments, since sequences that run together share roundings.
    """
    return max(1, min(batch, BATCH_BYTES // _batch_bytes(spec, length)))


def batches_at_once(spec: ModelSpec, tokens: int, workers: int, device: torch.device = CPU) -> int:
    """How many of `workers` may run a batch of `tokens` tokens each at once; this changes no result. One on a GPU."""
    if device.type == "cuda":
        return 1
    return max(1, min(workers, BATCHES_BYTES // _batch_bytes(spec, tokens)))


def load_block(
    source: WeightSource,
    index: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | None = None,
    without: Collection[str] = (),
) -> dict[str, Tensor]:
    """Every weight of one block by its name inside the block, e.g. att.receptance.weight, in `dtype` on `device`.

    Orientation as in the checkpoint; vectors stored as [1, 1, D] come as [D]. Block 0 also holds ln0.weight and
    ln0.bias. without: names that are left out. Raises CheckpointError naming a tensor with NaN or infinite values.
    """
    prefix = f"blocks.{index}."
    weights = {}
    for name in source.names():
        if name.startswith(prefix) and name.removeprefix(prefix) not in without:
            tensor = source.tensor(name)
            is_vector = tensor.dim() == 3 and tensor.shape[:2] == (1, 1)
            weights[name.removeprefix(prefix)] = (tensor.reshape(-1) if is_vector else tensor).to(device, dtype)
    return weights


@torch.no_grad()
def run_block(
    spec: ModelSpec,
    index: int,
    weights: Weights,
    x: Tensor,
    *,
    state: BlockState | None = None,
    v_first: Tensor | None = None,
    observe: Observe | None = None,
) -> tuple[Tensor, BlockState, Tensor | None]:
    """Run block `index` on x [B, T, D] (float32 or float64): output [B, T, D], state after token T, v_first.

    weights: as load_block returns them, in the dtype of x. state: None is zero. T > 1 runs in chunks, T = 1 as one
    recurrent step. v_first [B, T, D]: what block 0 of an x070 model returned for these tokens; None in block 0 and for
    x060. observe sees the input of every weight by its site.
    """
    return _run(spec, index, weights, x, state, v_first, observe)


@torch.enable_grad()
def run_block_with_graph(
    spec: ModelSpec, index: int, weights: Mapping[str, Any], x: Tensor, *, v_first: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As run_block from a zero state, recording the operations for a backward pass: output [B, T, D] and v_first.

    weights may hold taps (calibration.taps) in the place of tensors.
    """
    x, _, v_first = _run(spec, index, weights, x, None, v_first, None)
    return x, v_first


def _run(
    spec: ModelSpec,
    index: int,
    weights: Weights,
    x: Tensor,
    state: BlockState | None,
    v_first: Tensor | None,
    observe: Observe | None,
) -> tuple[Tensor, BlockState, Tensor | None]:
    state = state or BlockState.zero(spec, x.shape[0], x.dtype, x.device)
    observe = observe or no_observe
    if spec.version == "x060":
        x, state = rwkv6.run(spec, weights, x, state, observe)
        return x, state, None
    _check_v_first(index, v_first)
    return rwkv7.run(spec, weights, x, state, v_first, observe)


@torch.no_grad()
def observe_block(
    spec: ModelSpec, index: int, weights: Weights, x: Tensor, observe: Observe, *, v_first: Tensor | None = None
) -> None:
    """Let `observe` see the same sites as run_block from a zero state, without computing the block's output."""
    state = BlockState.zero(spec, x.shape[0], x.dtype, x.device)
    if spec.version == "x060":
        rwkv6.observe_only(spec, weights, x, state, observe)
    else:
        _check_v_first(index, v_first)
        rwkv7.observe_only(spec, weights, x, state, v_first, observe)


def _check_v_first(index: int, v_first: Tensor | None) -> None:
    if (v_first is None) != (index == 0):
        raise ValueError(f"block {index}: v_first comes from block 0 and goes to every later block")


@torch.no_grad()
def embed(emb: Tensor, ln0_weight: Tensor, ln0_bias: Tensor, ids: Tensor) -> Tensor:
    """The input of block 0 [B, T, D] for ids [B, T]; emb [V, D] of any float dtype, result in that of ln0_weight."""
    return layer_norm(emb[ids].to(ln0_weight.dtype), ln0_weight.reshape(-1), ln0_bias.reshape(-1))


@torch.no_grad()
def final_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ln_out of the last block's output; weight and bias [D]."""
    return layer_norm(x, weight.reshape(-1), bias.reshape(-1))
