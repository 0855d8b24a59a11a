"""KL(float model || student) of one window and its gradient, block by block: only the inputs of blocks are kept.

Everything is in the dtype of the student; the logits of a few tokens exist at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvq.distill.student import Student, Values
from rwkvq.models import run_block, run_block_with_graph
from rwkvq.models.layers import layer_norm

LOGITS_BYTES = 64 << 20
"""What the logits of one model for the tokens that are compared at once may take."""
_LN0 = ("blocks.0.ln0.weight", "blocks.0.ln0.bias")
_LN_OUT = ("ln_out.weight", "ln_out.bias")


@dataclass(frozen=True, slots=True)
class Teacher:
    """What the float model says about one window: its final hidden states [1, time, width]; and its head."""

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Input of a block [1, time, width], and v_first of x070."""

    x: Tensor
    v_first: Tensor | None


def hidden(student: Student, values: Values, ids: Tensor) -> Tensor:
    """The student's final hidden states [1, time, width] for ids [1, time]."""
    with torch.no_grad():
        x = _blocks(student, values, ids, lambda inputs: None)
        return layer_norm(x, *_pair(student, values, _LN_OUT))


def loss_and_gradients(student: Student, values: Values, ids: Tensor, teacher: Teacher) -> tuple[float, Values]:
    """Sum over tokens of KL(teacher || student) in nats, and its gradient to every one of `values`.

    ids [1, time] int64. Each block runs twice: forward, then again with its operations recorded.
    """
    inputs: list[_Inputs] = []
    with torch.no_grad():
        x = _blocks(student, values, ids, inputs.append)
    names = [name for name in _LN_OUT if name in values]
    with torch.enable_grad():
        weight, bias = (part.detach().requires_grad_() for part in _pair(student, values, _LN_OUT))
        x = x.requires_grad_()
        normalised = layer_norm(x, weight, bias)
    loss, gradient = _head(normalised.detach()[0], student.head, teacher)
    gradient, *of_norm = torch.autograd.grad(normalised, [x, weight, bias], gradient[None])
    found = {name: part for name, part in zip(_LN_OUT, of_norm, strict=True) if name in names}
    to_v_first = torch.zeros_like(gradient)
    for index in reversed(range(student.spec.layers)):
        gradient, to_v_first, own = _block_gradients(student, values, index, inputs[index], gradient, to_v_first)
        found |= own
    return loss, found | _embedding_gradients(student, values, ids, gradient)


def _pair(student: Student, values: Values, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    weight, bias = (values[name] if name in values else student.value(name) for name in names)
    return weight, bias


def _blocks(student: Student, values: Values, ids: Tensor, keep: Callable[[_Inputs], None]) -> Tensor:
    """The output of the last block; `keep` gets the inputs of each."""
    weight, bias = _pair(student, values, _LN0)
    x, v_first = layer_norm(student.emb[ids].to(weight.dtype), weight, bias), None
    for index in range(student.spec.layers):
        keep(_Inputs(x, v_first))
        x, _, v_first = run_block(student.spec, index, student.block(index, values)[0], x, v_first=v_first)
    return x


def _block_gradients(
    student: Student, values: Values, index: int, inputs: _Inputs, gradient: Tensor, to_v_first: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Gradients to the input of a block, to v_first so far, and to its vectors by their full names."""
    weights, moved = student.block(index, values)
    leaves = {name: value.detach().requires_grad_() for name, value in moved.items()}
    x = inputs.x.detach().requires_grad_()
    v_first = None if inputs.v_first is None else inputs.v_first.detach().requires_grad_()
    y, v_out = run_block_with_graph(student.spec, index, weights | leaves, x, v_first=v_first)
    outputs, gradients = [y], [gradient]
    if index == 0 and v_out is not None:
        outputs, gradients = [y, v_out], [gradient, to_v_first]
    wanted = [x, *leaves.values(), *([] if v_first is None else [v_first])]
    to_x, *rest = torch.autograd.grad(outputs, wanted, gradients)
    if v_first is not None:
        to_v_first = to_v_first + rest.pop()
    return to_x, to_v_first, {f"blocks.{index}.{name}": part for name, part in zip(leaves, rest, strict=True)}


def _embedding_gradients(student: Student, values: Values, ids: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    with torch.enable_grad():
        weight, bias = (part.detach().requires_grad_() for part in _pair(student, values, _LN0))
        x = layer_norm(student.emb[ids].to(weight.dtype), weight, bias)
    parts = torch.autograd.grad(x, [weight, bias], gradient)
    return {name: part for name, part in zip(_LN0, parts, strict=True) if name in values}


def _head(states: Tensor, head: Tensor, teacher: Teacher) -> tuple[float, Tensor]:
    """Summed KL of tokens with final hidden states [time, width], and its gradient to these: (q - p) head."""
    rows = max(1, LOGITS_BYTES // (head.element_size() * len(head)))
    loss, parts = 0.0, []
    for some, theirs in zip(torch.split(states, rows), torch.split(teacher.hidden[0], rows), strict=True):
        reference = F.linear(theirs, teacher.head).log_softmax(-1)
        own = F.linear(some, head).log_softmax(-1)
        probabilities = reference.exp()
        loss += float(torch.linalg.vecdot(probabilities, reference - own).sum(dtype=torch.float64))
        parts.append(own.exp_().sub_(probabilities) @ head)
    return loss, torch.cat(parts)
