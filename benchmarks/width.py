"""Whether rotating inputs and ordering columns pays at twice a model's width: squared output errors of single weights.

    python -m benchmarks.width --model rwkv7-26m --tokenizer tokenizer.json --calibration books_calibration.txt

A weight of twice the width is put together from trained parts: its input is what two blocks see at the same place on
the same tokens, side by side, so its second moment is a measured one; its four quarters are the trained matrices of
four blocks. Every error is tr(dW H dW^T) over that of the plain method on the same weight at the same code bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from scipy.stats import gmean
from torch import Tensor

from benchmarks.quality import markdown_table
from rwkvq.calibration.activations import read_block
from rwkvq.calibration.statistics import SecondMoment
from rwkvq.checkpoint.names import weights_of
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.files import write_text
from rwkvq.formats import FORMATS, Codes, ScalarLayout, TrellisLayout
from rwkvq.formats.hadamard import rotate, rotate_moment, unrotate
from rwkvq.models import load_block, observe_block
from rwkvq.quantize import gptq, trellis
from rwkvq.quantize.gptq import GptqOptions
from rwkvq.quantize.hessian import relative_loss
from rwkvq.quantize.rotation import draw_flips
from rwkvq.quantize.trellis import TrellisOptions
from rwkvq.run import Run
from rwkvq.settings import parse
from rwkvq.stages import run_stage

NAMES = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
BITS, GROUP, STATE_BITS = 3, 64, 12
METHODS = ("trellis", "trellis, rotated", "trellis, ordered", "GPTQ", "GPTQ, rotated", "GPTQ, ordered")


def inputs_of(run: Run, block: int) -> dict[str, list[Tensor]]:
    """What each site of a block sees, batch by batch [batch, time, features]."""
    source, seen = run.checkpoint, dict[str, list[Tensor]]()
    weights = load_block(source, block)
    for batch in read_block(run.activations, block, model_sha256=source.identity()):
        used = batch.without_held_out()
        observe_block(
            source.spec,
            block,
            weights,
            used.x,
            lambda site, x: seen.setdefault(site, []).append(x),
            v_first=used.v_first,
        )
    return seen


def wide_weight(source: Checkpoint, name: str, blocks: tuple[int, int, int, int]) -> Tensor:
    """Four trained matrices as one, float32 [2 out, 2 in]."""
    quarters = [source.tensor(f"blocks.{block}.{name}.weight").float() for block in blocks]
    return torch.cat([torch.cat(quarters[:2], 1), torch.cat(quarters[2:], 1)])


def errors(weight: Tensor, moment: Tensor) -> dict[str, float]:
    """Relative squared output error by method; a permutation of columns is counted as free."""
    rows, columns = weight.shape
    flips, order = draw_flips(columns), moment.diagonal().argsort(descending=True)
    turned = rotate(weight, flips), rotate_moment(moment, flips)
    ordered = weight[:, order].contiguous(), moment[order][:, order].contiguous()

    def coded(weight: Tensor, moment: Tensor) -> Tensor:
        layout = TrellisLayout(rows, columns, 4 * BITS, STATE_BITS, 256, 0, 3)
        return decoded(trellis.quantize(weight, moment, layout, TrellisOptions(), torch.ones(rows)))

    def rounded(weight: Tensor, moment: Tensor, options: GptqOptions) -> Tensor:
        return decoded(gptq.quantize(weight, moment, ScalarLayout(rows, columns, BITS, GROUP, True), options))

    plain, static = GptqOptions(clip_search=True), GptqOptions(clip_search=True, static_groups=True, act_order=True)
    back = order.argsort()
    found = (
        coded(weight, moment),
        unrotate(coded(*turned), flips),
        coded(*ordered)[:, back],
        rounded(weight, moment, plain),
        unrotate(rounded(*turned, plain), flips),
        rounded(weight, moment, static),
    )
    return {method: relative_loss(weight, values, moment) for method, values in zip(METHODS, found, strict=True)}


def decoded(codes: Codes) -> Tensor:
    """The float32 weight that codes stand for."""
    values: Tensor = FORMATS[codes.layout.format].decode(codes)
    return values


def main(
    model: Annotated[Path, typer.Option()],
    tokenizer: Annotated[Path, typer.Option()],
    calibration: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()] = Path("benchmarks/width.md"),
    work: Annotated[Path, typer.Option(help="Intermediate files.")] = Path("data/runs/benchmark-width"),
    windows: Annotated[int, typer.Option()] = 32,
) -> None:
    """Make the page."""
    source = {"source": str(calibration), "tokenizer": str(tokenizer), "samples": windows, "held_out": 0}
    run = Run(parse({"model": str(model), "run_dir": str(work / model.stem), "windows": source}, "benchmarks.width"))
    for stage in ("windows", "activations"):
        run_stage(run, stage)
    spec, checkpoint = run.checkpoint.spec, run.checkpoint
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    sites = {weight.name: str(weight.site) for weight in weights_of(spec, shapes)}
    first = range(1, spec.layers // 2)
    table: dict[str, list[dict[str, float]]] = {}
    for near in first:
        far = near + spec.layers // 2
        seen = inputs_of(run, near), inputs_of(run, far)
        for name in NAMES:
            site = sites[f"blocks.{near}.{name}.weight"]
            moment = SecondMoment(sum(side[site][0].shape[-1] for side in seen))
            for pair in zip(seen[0][site], seen[1][site], strict=True):
                moment.add(torch.cat(pair, -1))
            weight = wide_weight(checkpoint, name, (near, far - 1, near - 1, far))
            table.setdefault(name, []).append(errors(weight, moment.finish()))
            typer.echo(f"{name} of blocks {near} and {far}: {table[name][-1]}")
    rows = []
    for name, found in table.items():
        ratios = [f"{gmean([item[method] / item[base_of(method)] for item in found]):.3f}" for method in METHODS]
        rows.append([name, *ratios])
    text = __doc__ or ""
    shape = (
        f"{model.stem}: width {spec.width}, so {2 * spec.width} here; geometric means over {len(first)} pairs of blocks"
    )
    bits = f"{windows} calibration windows; trellis of {BITS} bits, L = {STATE_BITS}, offsets of columns; "
    bits += f"GPTQ of {BITS} bits, symmetric groups of {GROUP}, clip search; ordered = by falling second moment."
    write_text(out, f"# Twice the width\n\n{text}\n{shape}\n{bits}\n\n{markdown_table(['weight', *METHODS], rows)}\n")


def base_of(method: str) -> str:
    """The plain method that a variant is held against."""
    return method.partition(",")[0]


if __name__ == "__main__":
    typer.run(main)
