"""Every tensor of an RWKV-6 or RWKV-7 checkpoint: its shape, its class, its orientation, and the site that feeds it.

The names are those of the released files (RWKV-LM RWKV-v5/src/model.py for x060, RWKV-v7/rwkv_v7_demo.py for x070).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rwkvq.checkpoint.spec import ModelSpec

WeightClass = Literal["matrix", "lora", "elementwise", "keep"]

MIX_ORDER = "wkvrg"
"""Order of the five paths in the first axis of x060's time_maa_w2 and in the columns of time_maa_w1."""
OUTER = ("emb.weight", "head.weight")
"""What lies outside the blocks and is large [vocab, width]."""
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
"""x070 files may hold these; block 0 has no value residual, so nothing reads them."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight as it is quantized: a whole checkpoint tensor, or one of the five slices of time_maa_w2.

    shape is (out, in) after transposing for classes matrix and lora, (size,) for elementwise, as stored for keep.
    """

    name: str  # unique: tensor name, with ".w" ".k" ".v" ".r" ".g" for the slices of time_maa_w2
    tensor: str  # checkpoint tensor in the released naming
    index: int | None  # slice in the tensor's first axis
    weight_class: WeightClass
    transposed: bool  # the checkpoint stores [in, out]
    shape: tuple[int, ...]
    block: int | None  # None for emb, head and ln_out
    site: str | None  # the activation that feeds it; None for keep


@dataclass(frozen=True, slots=True)
class _Row:
    """A tensor of the tables below; axes are names of sizes, see _sizes."""

    name: str
    weight_class: WeightClass
    site: str | None
    axes: tuple[str, ...]
    transposed: bool = False


def _matrix(name: str, site: str, axes: str = "D D") -> _Row:
    return _Row(f"{name}.weight", "matrix", site, tuple(axes.split()))


def _lora(name: str, site: str, axes: str) -> _Row:
    return _Row(name, "lora", site, tuple(axes.split()), transposed=True)


def _elementwise(name: str, site: str, axes: str = "D") -> _Row:
    return _Row(name, "elementwise", site, tuple(axes.split()))


def _keep(name: str, axes: str = "D") -> _Row:
    return _Row(name, "keep", None, tuple(axes.split()))


def _norms(*names: str) -> tuple[_Row, ...]:
    return tuple(_keep(f"{name}.{part}") for name in names for part in ("weight", "bias"))


_BLOCK_ROWS: Mapping[str, tuple[_Row, ...]] = {
    "x060": (
        *_norms("ln1", "ln2"),
        *(_elementwise(f"att.time_maa_{path}", "att_dx") for path in "xwkvrg"),
        _lora("att.time_maa_w1", "maa_z", "D 5mix"),
        _lora("att.time_maa_w2", "maa_rank", "5 mix D"),
        _keep("att.time_decay"),
        _lora("att.time_decay_w1", "xw", "D decay"),
        _lora("att.time_decay_w2", "decay_rank", "decay D"),
        _keep("att.time_faaaa", "H N"),
        _matrix("att.receptance", "xr"),
        _matrix("att.key", "xk"),
        _matrix("att.value", "xv"),
        _matrix("att.output", "att_output"),
        _matrix("att.gate", "xg"),
        *_norms("att.ln_x"),
        _elementwise("ffn.time_maa_k", "ffn_dx"),
        _elementwise("ffn.time_maa_r", "ffn_dx"),
        _matrix("ffn.key", "ffn_key", "F D"),
        _matrix("ffn.receptance", "ffn_receptance"),
        _matrix("ffn.value", "ffn_value", "D F"),
    ),
    "x070": (
        *_norms("ln1", "ln2"),
        *(_elementwise(f"att.x_{path}", "att_dx") for path in "rwkvag"),
        *(
            row
            for path in "wav"
            for row in (
                _keep(f"att.{path}0"),
                _lora(f"att.{path}1", f"x{path}", f"D {path}"),
                _lora(f"att.{path}2", f"{path}_rank", f"{path} D"),
            )
        ),
        _lora("att.g1", "xg", "D g"),
        _lora("att.g2", "g_rank", "g D"),
        _elementwise("att.k_k", "k_raw"),
        _elementwise("att.k_a", "a_minus_1"),
        _elementwise("att.r_k", "r_times_k", "H N"),
        _matrix("att.receptance", "xr"),
        _matrix("att.key", "xk"),
        _matrix("att.value", "xv"),
        _matrix("att.output", "att_output"),
        *_norms("att.ln_x"),
        _elementwise("ffn.x_k", "ffn_dx"),
        _matrix("ffn.key", "ffn_key", "F D"),
        _matrix("ffn.value", "ffn_value", "D F"),
    ),
}


def _sizes(spec: ModelSpec) -> dict[str, int]:
    named = {"D": spec.width, "H": spec.heads, "N": spec.head_size, "F": spec.ffn, "V": spec.vocab, "5": 5}
    return named | dict(spec.lora_ranks) | {"5mix": 5 * spec.lora_ranks.get("mix", 0)}


def _rows(spec: ModelSpec) -> Iterator[tuple[int | None, str, _Row]]:
    """(block, full tensor name, row) of every used tensor, in the released order."""
    yield None, "emb.weight", _keep("emb.weight", "V D")
    for block in range(spec.layers):
        rows = _BLOCK_ROWS[spec.version]
        for row in (*rows[:4], *_norms("ln0"), *rows[4:]) if block == 0 else rows:
            name = f"blocks.{block}.{row.name}"
            if spec.version != "x070" or name not in UNUSED:
                yield block, name, row
    for row in (*_norms("ln_out"), _keep("head.weight", "V D")):
        yield None, row.name, row


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every used tensor, in the released order; vectors as (D,), files may store [1, 1, D]."""
    sizes = _sizes(spec)
    return {name: tuple(sizes[axis] for axis in row.axes) for _, name, row in _rows(spec)}


def unused_tensors(spec: ModelSpec, names: Iterable[str]) -> list[str]:
    """Those of `names` that a file may hold but no computation reads."""
    present = set(names)
    return [name for name in UNUSED if spec.version == "x070" and name in present]


def weights_of(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> list[Weight]:
    """Every used tensor exactly once (time_maa_w2 as five slices), ordered by block, then as released.

    shapes: stored shape by tensor name; it must hold every used tensor.
    """
    return [weight for block, name, row in _rows(spec) for weight in _weights_of_tensor(block, name, row, shapes[name])]


def _weights_of_tensor(block: int | None, name: str, row: _Row, stored: tuple[int, ...]) -> Iterator[Weight]:
    if len(row.axes) == 3:
        slice_shape = (stored[2], stored[1])
        for index, path in enumerate(MIX_ORDER):
            site = f"{row.site}_{path}"
            yield Weight(f"{name}.{path}", name, index, row.weight_class, row.transposed, slice_shape, block, site)
        return
    shape = stored
    if row.weight_class == "elementwise":
        size = 1
        for length in stored:
            size *= length
        shape = (size,)
    elif row.transposed:
        shape = (stored[1], stored[0])
    yield Weight(name, name, None, row.weight_class, row.transposed, shape, block, row.site)


def extract(tensor: Tensor, weight: Weight) -> Tensor:
    """The weight inside its checkpoint tensor: [out, in], [size], or as stored (keep); same dtype, contiguous."""
    part = tensor if weight.index is None else tensor[weight.index]
    if weight.transposed:
        part = part.T
    return part.reshape(weight.shape).contiguous()


def assemble(parts: Mapping[str, Tensor], weights: Sequence[Weight], stored_shape: tuple[int, ...]) -> Tensor:
    """The checkpoint tensor [stored_shape] made of `weights`, which are all the weights of one tensor.

    parts: each weight by name, as extract returned it. The inverse of extract.
    """
    pieces = []
    for weight in sorted(weights, key=lambda item: item.index or 0):
        part = parts[weight.name].reshape(weight.shape)
        pieces.append(part.T if weight.transposed else part)
    whole = pieces[0] if weights[0].index is None else torch.stack(pieces)
    return whole.reshape(stored_shape).contiguous()
