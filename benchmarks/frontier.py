r"""Quality against size: policy budget from 2.25 to 4.5 matrix bits, and the baselines at every width they have.

    python -m benchmarks.frontier --models rwkv7-9m.pth --tokenizer tokenizer.json \
        --calibration books_calibration.txt --text books_validation.txt

Everything is made before anything is evaluated. The page says for each baseline what policy budget loses at the same
matrix bits, interpolated between its points on a logarithmic scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.quality import (
    ASYM,
    CLIP,
    PLAIN,
    SYM,
    VECTOR_2D,
    Made,
    base_settings,
    engines_of,
    make_all,
    markdown_table,
)
from rwkvq.evaluation.divergence import TextResult, compare_on_text
from rwkvq.evaluation.perplexity import text_windows
from rwkvq.files import write_json, write_text
from rwkvq.models.tokenizer import load_tokenizer
from rwkvq.plan.bits import totals

SIZES = (2.25, 2.5, 2.75, 3.0, 3.275, 3.5, 3.75, 4.0, 4.25, 4.5)
BASELINES: dict[str, tuple[str, ...]] = {
    "RTN, asymmetric g64": ("plan.policy=rtn", ASYM, PLAIN),
    "GPTQ, asymmetric g64 + clip": ("plan.policy=sq", ASYM, CLIP),
    "GPTQ, symmetric g128 + clip": ("plan.policy=sq", SYM, CLIP, "quantize.scalar.group_size=128"),
    "GPTVQ, 2-D l 4096": ("plan.policy=vq", *VECTOR_2D),
    "RWKVQuant, preset text": ("plan.policy=rwkvquant", "plan.preset=text"),
    "RWKVQuant, preset rwkvq": ("plan.policy=rwkvquant", "plan.preset=rwkvq"),
}
OURS = "budget, quality"


def methods() -> dict[str, tuple[str, ...]]:
    """Settings of every point, by its name."""
    baselines = {
        f"{name}, {bits} bits": (*settings, f"quantize.bits={bits}")
        for name, settings in BASELINES.items()
        for bits in (2, 3, 4)
    }
    ours = {f"{OURS}, {bpw:g}": ("plan.policy=budget", f"plan.bpw={bpw}") for bpw in SIZES}
    return baselines | ours


def matrix_bits(made: Made) -> float:
    """Stored bits a weight of matrices and LoRA factors."""
    bits = totals(made.artifact.plan).matrix_bits
    assert bits is not None
    return bits


def rows(made: dict[str, Made], texts: dict[str, TextResult]) -> list[list[str]]:
    """One line a point: bits, divergence, and that of policy budget at the same bits over it."""
    ours = sorted((matrix_bits(made[name]), texts[name].kl or 0.0) for name in made if name.startswith(OURS))
    sizes, losses = np.array(ours).T
    lines = []
    for name, item in made.items():
        bits, kl = matrix_bits(item), texts[name].kl or 0.0
        inside = sizes[0] <= bits <= sizes[-1] and not name.startswith(OURS)
        ratio = f"{np.exp(np.interp(bits, sizes, np.log(losses))) / kl:.3f}" if inside else ""
        lines.append([name, f"{bits:.3f}", f"{kl:.4f} ± {texts[name].kl_se or 0.0:.4f}", ratio])
    return lines


def main(
    models: Annotated[list[Path], typer.Option(help="Float checkpoints.")],
    tokenizer: Annotated[Path, typer.Option()],
    calibration: Annotated[Path, typer.Option()],
    text: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()] = Path("benchmarks/frontier.md"),
    work: Annotated[Path, typer.Option(help="Intermediate files.")] = Path("data/runs/benchmark-frontier"),
    windows: Annotated[int, typer.Option()] = 64,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make the page."""
    sections = [__doc__ or ""]
    loaded = load_tokenizer(tokenizer)
    ids = text_windows(text.read_text(encoding="utf-8"), loaded, windows, 512, where=str(text))
    for model in models:
        folder = work / model.stem
        base = base_settings(model, folder, calibration, tokenizer)
        made = make_all(base, folder, methods(), seed)
        texts = compare_on_text(*engines_of(base, made), ids)
        found = rows(made, texts)
        write_json(folder / "frontier.json", {"rows": found})
        header = ["method", "matrix bits", "KL (nats)", "budget at these bits, of it"]
        sections.append(f"## {model.stem}\n\n{markdown_table(header, found)}\n")
        write_text(out, "# Quality against size\n\n" + "\n".join(sections))


if __name__ == "__main__":
    typer.run(main)
