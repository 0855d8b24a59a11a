"""How the defaults of preset `rwkvq` were chosen: candidates measured by KL on held-out calibration windows.

    python -m benchmarks.defaults --model data/demo/rwkv7-9m.pth --out benchmarks/defaults.md

No evaluation text is touched. Differences below 4 % mean nothing: insignificant changes of a recipe move KL by as
much.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.quality import make_all, markdown_table
from rwkvq.calibration.windows import read_windows
from rwkvq.engine.model import Engine
from rwkvq.evaluation.divergence import compare_on_text
from rwkvq.files import write_json, write_text
from rwkvq.plan.bits import totals
from rwkvq.run import Run
from rwkvq.settings import parse

SWEEPS = "quantize.sweeps=2"
SYM, ASYM = "quantize.scalar.symmetric=true", "quantize.scalar.symmetric=false"
ORDERED = ("quantize.scalar.static_groups=true", "quantize.scalar.act_order=true")


def share(value: float, *more: str) -> tuple[str, ...]:
    """The hybrid with this share of SQ weights."""
    return ("plan.policy=rwkvquant", f"plan.decision.share={value}", "plan.decision.share_by=weights", *more)


CANDIDATES: dict[str, tuple[str, ...]] = {
    "GPTQ asym + clip": ("plan.policy=sq", ASYM),
    "GPTQ asym + clip, 2 sweeps": ("plan.policy=sq", ASYM, SWEEPS),
    "GPTQ sym + clip, 2 sweeps": ("plan.policy=sq", SYM, SWEEPS),
    "GPTQ sym + clip, act-order, 2 sweeps": ("plan.policy=sq", SYM, SWEEPS, *ORDERED),
    "GPTVQ 2-D": ("plan.policy=vq",),
    "GPTVQ 2-D, 2 sweeps": ("plan.policy=vq", SWEEPS),
    "GPTVQ 2-D, 4 sweeps": ("plan.policy=vq", "quantize.sweeps=4"),
    "hybrid, 5 % SQ, 2 sweeps": share(0.05, SWEEPS),
    "hybrid, 10 % SQ, 2 sweeps": share(0.1, SWEEPS),
    "hybrid, 10 % SQ, gap mode unique": share(0.1, SWEEPS, "plan.decision.gap_mode=unique"),
    "hybrid, 10 % SQ sym, 2 sweeps": share(0.1, SWEEPS, SYM),
    "hybrid, 30 % SQ, 2 sweeps": share(0.3, SWEEPS),
    "hybrid, 50 % SQ, 2 sweeps": share(0.5, SWEEPS),
    "hybrid, 10 % SQ, damping 0.03": share(0.1, SWEEPS, "quantize.damping=0.03"),
}


def main(
    model: Annotated[list[Path], typer.Option(help="Float checkpoints.")],
    tokenizer: Annotated[Path, typer.Option()] = Path("data/demo/tokenizer.json"),
    calibration: Annotated[Path, typer.Option()] = Path("data/demo/calibration.txt"),
    out: Annotated[Path, typer.Option()] = Path("benchmarks/defaults.md"),
    work: Annotated[Path, typer.Option()] = Path("data/runs/benchmark-defaults"),
    only: Annotated[str, typer.Option(help="Part of the names of the candidates to run.")] = "",
) -> None:
    """Measure every candidate and write the table."""
    chosen = {name: overrides for name, overrides in CANDIDATES.items() if only in name}
    parts = [
        "# How the defaults were chosen\n\nMade by `python -m benchmarks.defaults`. KL(float || quantized) in nats on "
        "16 held-out windows of 512 tokens of the calibration text, which no statistic used; no evaluation text is "
        "touched. Differences below 4 % mean nothing.\n"
    ]
    for path in model:
        folder = work / path.stem
        base: dict[str, Any] = {
            "model": str(path),
            "run_dir": str(folder),
            "windows": {"source": str(calibration), "tokenizer": str(tokenizer), "held_out": 16},
        }
        made = make_all(base, folder, chosen, 0)
        used = read_windows(Run(parse(base, "base")).windows)
        ids = torch.from_numpy(used.ids[used.held_out]).long()
        engines = {name: Engine(item.artifact) for name, item in made.items()}
        found = compare_on_text(Engine(Run(parse(base, "base")).checkpoint), engines, ids)
        rows = [
            [
                name,
                f"{totals(item.artifact.plan).matrix_bits:.4f}",
                f"{found[name].kl:.5f} ± {found[name].kl_se:.5f}",
                f"{item.seconds:.0f}",
            ]
            for name, item in made.items()
        ]
        write_json(folder / "rows.json", rows)
        for row in rows:
            print("  ".join(row), file=sys.stderr)
        parts += [f"\n## {path.stem}\n", markdown_table(["candidate", "matrix bits", "held-out KL", "s"], rows), ""]
    write_text(out, "\n".join(parts))


if __name__ == "__main__":
    typer.run(main)
