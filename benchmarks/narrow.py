"""A model of a width that nobody trained: the first heads of a trained one, trained further on some text.

    python -m benchmarks.narrow --model rwkv7-26m --width 320 --tokenizer tokenizer.json --text wikitext2_valid.txt \
        --text books_calibration.txt --steps 220 --out rwkv7-320.safetensors --device cuda

Every tensor keeps its leading rows and columns, and training repairs what that breaks, as far as its steps go. Such a
model is worse than one trained whole; its weights and what they see are those of a trained one all the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from rwkvq.checkpoint.names import expected_shapes
from rwkvq.checkpoint.reader import WeightSource, open_checkpoint
from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.checkpoint.writer import write_safetensors
from rwkvq.models import run_block_with_graph
from rwkvq.models.layers import layer_norm
from rwkvq.models.tokenizer import load_tokenizer

LENGTH = 512
WARM_UP = 20
"""Steps in which the learning rate rises from 0."""


def narrowed(spec: ModelSpec, width: int) -> ModelSpec:
    """The sizes of a model with the first heads of `spec` alone. Raises typer.BadParameter."""
    if width % spec.head_size or not 0 < width <= spec.width:
        raise typer.BadParameter(f"{width} is not a multiple of {spec.head_size} up to {spec.width}")
    ffn = spec.ffn * width // spec.width
    return dataclasses.replace(spec, width=width, heads=width // spec.head_size, ffn=ffn)


def leading_parts(source: WeightSource, spec: ModelSpec) -> dict[str, Tensor]:
    """Every tensor of `spec` in float32: the leading part of the one in `source`, vectors as [D]."""
    parts = {}
    for name, shape in expected_shapes(spec).items():
        tensor = source.tensor(name).float()
        tensor = tensor.reshape(-1) if len(shape) == 1 else tensor
        parts[name] = tensor[tuple(slice(size) for size in shape)].contiguous()
    return parts


def loss_of(spec: ModelSpec, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Nats a token of ids [B, T + 1], each token from those before it."""
    x = layer_norm(weights["emb.weight"][ids[:, :-1]], weights["blocks.0.ln0.weight"], weights["blocks.0.ln0.bias"])
    v_first = None
    for index in range(spec.layers):
        prefix = f"blocks.{index}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        x, v_out = run_block_with_graph(spec, index, own, x, v_first=v_first)
        v_first = v_out if index == 0 else v_first
    logits = F.linear(layer_norm(x, weights["ln_out.weight"], weights["ln_out.bias"]), weights["head.weight"])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def batches(ids: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches [size, LENGTH + 1] from random places of ids [n]."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(ids) - LENGTH, (size,), generator=generator)
        yield ids[starts[:, None] + torch.arange(LENGTH + 1)]


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a linear rise, then half a cosine down to a twentieth."""
    return min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


def main(
    model: Annotated[Path, typer.Option(help="Float checkpoint.")],
    width: Annotated[int, typer.Option(help="Channels that are kept: whole heads.")],
    tokenizer: Annotated[Path, typer.Option()],
    text: Annotated[list[Path], typer.Option(help="Texts to train on.")],
    out: Annotated[Path, typer.Option(help="The model in bfloat16, .safetensors.")],
    steps: Annotated[int, typer.Option(min=1)] = 400,
    batch: Annotated[int, typer.Option(min=1, help=f"Windows of {LENGTH} tokens a step.")] = 16,
    rate: Annotated[float, typer.Option(help="Largest learning rate.")] = 1e-3,
    device: Annotated[str, typer.Option()] = "cpu",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Cut, train, write."""
    source, loaded = open_checkpoint(model), load_tokenizer(tokenizer)
    spec = narrowed(source.spec, width)
    weights = {name: part.to(device).requires_grad_() for name, part in leading_parts(source, spec).items()}
    ids = torch.tensor([token for path in text for token in loaded.encode(path.read_text(encoding="utf-8"))])
    optimizer = torch.optim.AdamW(weights.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    for step, windows in zip(range(steps), batches(ids, batch, seed), strict=False):
        loss = loss_of(spec, weights, windows.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            typer.echo(f"step {step}: {loss.item():.3f} nats a token")
    entries = [(name, torch.bfloat16, tuple(value.shape)) for name, value in weights.items()]
    parts = ((name, value.detach().cpu().bfloat16()) for name, value in weights.items())
    write_safetensors(out, entries, parts, {"format": "pt"})
    typer.echo(f"{out}: {spec}; trained on {len(ids)} tokens, {steps} steps of {batch * LENGTH}")


if __name__ == "__main__":
    typer.run(main)
