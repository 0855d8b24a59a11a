"""Two-layer random RWKV-6 and RWKV-7 models, in memory and on disk, and a vocabulary of single bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rwkvq.checkpoint.names import MIX_ORDER, UNUSED, expected_shapes
from rwkvq.checkpoint.spec import ModelSpec, Version

VOCAB = 320
"""Default vocabulary: room for the 256 bytes of write_byte_vocabulary, which takes ids 1 to 256."""


def tiny_spec(
    version: Version, *, layers: int = 2, width: int = 128, ffn: int | None = None, vocab: int = VOCAB
) -> ModelSpec:
    """Sizes of a tiny model with heads of 64; width must be a multiple of 64."""
    ranks = {"mix": 16, "decay": 32} if version == "x060" else {"w": 32, "a": 32, "v": 16, "g": 48}
    if layers == 1 and version == "x070":
        ranks["v"] = 0
    return ModelSpec(
        version=version,
        layers=layers,
        width=width,
        heads=width // 64,
        head_size=64,
        ffn=ffn or 2 * width,
        vocab=vocab,
        lora_ranks=ranks,
    )


def tiny_tensors(
    version: Version,
    *,
    layers: int = 2,
    width: int = 128,
    ffn: int | None = None,
    vocab: int = VOCAB,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    with_unused: bool = False,
) -> dict[str, Tensor]:
    """Random weights in the released naming, scaled so that activations stay near 1 and logits differ by token.

    Vectors are stored as [1, 1, D] where released files do so. with_unused adds blocks.0.att.v0, v1, v2 (x070).
    """
    spec = tiny_spec(version, layers=layers, width=width, ffn=ffn, vocab=vocab)
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(spec)
    if with_unused:
        shapes |= dict(zip(UNUSED, ((width,), (width, 16), (16, width)), strict=True))
    return {name: _random(name, shape, generator).to(dtype) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    short = name.rsplit(".att.", 1)[-1].rsplit(".ffn.", 1)[-1]
    if name.endswith((".bias", "ln1.weight", "ln2.weight", "ln0.weight", "ln_x.weight", "ln_out.weight")):
        center = 0.0 if name.endswith(".bias") else 1.0
        return center + 0.1 * torch.randn(shape, generator=generator)
    if len(shape) == 1:
        spread, center = _VECTORS.get(short, (0.25, 0.5))
        vector = center + spread * torch.randn(shape, generator=generator)
        return vector.reshape(1, 1, -1)
    if short in ("r_k", "time_faaaa"):
        return 0.3 * torch.randn(shape, generator=generator)
    if name == "emb.weight":
        return torch.randn(shape, generator=generator)
    fan_in = shape[-1] if name.endswith(".weight") else shape[-2]
    gain = 2.0 if name == "head.weight" else 1.0
    return gain * torch.randn(shape, generator=generator) / fan_in**0.5


_VECTORS = {
    "time_decay": (1.5, -2.0),
    "w0": (1.5, 0.0),
    "a0": (0.5, 0.0),
    "v0": (0.5, 0.0),
    "k_k": (0.2, 0.85),
    "k_a": (0.1, 1.0),
    **{f"time_maa_{path}": (0.25, 0.5) for path in "x" + MIX_ORDER},
}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors as .pth or .safetensors by the suffix of `path`; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def write_tiny(
    path: Path,
    version: Version,
    *,
    layers: int = 2,
    width: int = 128,
    ffn: int | None = None,
    vocab: int = VOCAB,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a tiny model as .pth or .safetensors by the suffix of `path`; returns `path`."""
    tensors = tiny_tensors(version, layers=layers, width=width, ffn=ffn, vocab=vocab, seed=seed, dtype=dtype)
    return write_tensors(path, tensors)


def write_byte_vocabulary(path: Path) -> Path:
    """Write a World vocabulary (.txt) of the 256 single bytes, id = byte + 1; returns `path`."""
    lines = (f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256))
    path.write_text("".join(lines), encoding="utf-8")
    return path
