"""Weights that tell, in a backward pass, what came in at their input and which gradient came back to their output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwkvq.checkpoint.names import Weight

OnGradient = Callable[[str, Tensor, Tensor], None]
"""Called as on_gradient(weight name, x [batch, time, in], dL/dy [batch, time, out])."""


@dataclass(frozen=True, slots=True)
class Tap:
    """A weight in the place of its tensor: products with it are what they were, and their gradients are told."""

    name: str
    tensor: Tensor
    on_gradient: OnGradient

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: Any = None
    ) -> Any:
        """Run a torch function with the tensor itself; the first argument is taken to be the input of the product."""
        (tap,) = [argument for argument in args if isinstance(argument, cls)]
        plain = [argument.tensor if isinstance(argument, cls) else argument for argument in args]
        result = function(*plain, **(kwargs or {}))
        if result.requires_grad:
            result.register_hook(partial(tap.on_gradient, tap.name, plain[0].detach()))
        return result


def tapped(
    weights: Mapping[str, Tensor], watched: Sequence[Weight], on_gradient: OnGradient
) -> dict[str, Tensor | Tap | list[Tap]]:
    """The weights of a block with taps in the place of those of `watched`; a list for a tensor of several weights."""
    result: dict[str, Any] = dict(weights)
    for weight in watched:
        name = weight.tensor.split(".", 2)[2]
        if weight.index is None:
            result[name] = Tap(weight.name, weights[name], on_gradient)
        else:
            slices = result[name] if isinstance(result[name], list) else list(torch.unbind(weights[name]))
            slices[weight.index] = Tap(weight.name, weights[name][weight.index], on_gradient)
            result[name] = slices
    return result
