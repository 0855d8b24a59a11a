"""Quality at honest bits: every method on the same model, calibration windows and evaluation text, in one table.

    python -m benchmarks.quality --models rwkv7-9m.pth --models rwkv6-10m.safetensors --tokenizer tokenizer.json \
        --calibration books_calibration.txt --text books_validation.txt --lambada lambada_dev.jsonl

With --ruler FILE (an independent evaluator with the command `kl MODEL OTHER --text FILE --tokenizer FILE` that prints
JSON) every exported model is measured again from outside. Everything is made before anything is evaluated.

Other texts and models go to pages of their own: --out FILE.md --title TITLE --note PARAGRAPH, with --method for some
methods only (quality-narrow.md, quality-wikitext.md, quality-within-wikitext.md).

Rows are kept in a .json beside the page, each with the commit that it was measured at: with --method or --models
only those rows are measured again. A seed other than 0 makes rows of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from rwkvq.artifact.reader import Artifact, open_artifact
from rwkvq.checkpoint.writer import export_checkpoint
from rwkvq.documents import read_json
from rwkvq.engine.model import Engine
from rwkvq.evaluation.divergence import FLOAT, TextResult, compare_on_text
from rwkvq.evaluation.lambada import LambadaResult, lambada, read_examples
from rwkvq.evaluation.perplexity import text_windows
from rwkvq.files import write_json, write_text
from rwkvq.models.tokenizer import load_tokenizer
from rwkvq.plan.bits import totals
from rwkvq.run import Run
from rwkvq.settings import apply_overrides, parse
from rwkvq.stages import run_stage, stages_of

VECTOR_1D = ("quantize.vector.dimension=1", "quantize.vector.group_rows=4", "quantize.vector.group_columns=64")
VECTOR_2D = ("quantize.vector.dimension=2", "quantize.vector.group_rows=64", "quantize.vector.group_columns=64")
PLAIN, CLIP = "quantize.scalar.clip_search=false", "quantize.scalar.clip_search=true"
ASYM, SYM = "quantize.scalar.symmetric=false", "quantize.scalar.symmetric=true"

METHODS: dict[str, tuple[str, ...]] = {
    "RTN, asymmetric g64": ("plan.policy=rtn", ASYM, PLAIN),
    "GPTQ, asymmetric g64": ("plan.policy=sq", ASYM, PLAIN),
    "GPTQ, asymmetric g64 + clip": ("plan.policy=sq", ASYM, CLIP),
    "GPTQ, symmetric g64": ("plan.policy=sq", SYM, PLAIN),
    "GPTQ, symmetric g64 + clip": ("plan.policy=sq", SYM, CLIP),
    "AWQ-style scaling, asymmetric g64": ("plan.policy=awq", ASYM, PLAIN),
    "AWQ-style scaling, asymmetric g64 + clip": ("plan.policy=awq", ASYM, CLIP),
    "GPTQ after input rotation, symmetric g64 + clip": ("plan.policy=rotation", SYM, CLIP),
    "k-means, 1-D l 256": ("plan.policy=kmeans", *VECTOR_1D),
    "GPTVQ, 1-D l 256": ("plan.policy=vq", *VECTOR_1D),
    "GPTVQ, 2-D l 4096": ("plan.policy=vq", *VECTOR_2D),
    "HQQ g128": ("plan.policy=hqq",),
    "VPTQ-style, d 4 + residual": ("plan.policy=residual",),
    "RWKVQuant, preset text": ("plan.policy=rwkvquant", "plan.preset=text"),
    "RWKVQuant, preset camera": ("plan.policy=rwkvquant", "plan.preset=camera"),
    "RWKVQuant, preset official": ("plan.policy=rwkvquant", "plan.preset=official"),
    "RWKVQuant, preset rwkvq": ("plan.policy=rwkvquant", "plan.preset=rwkvq"),
    "budget, speed": ("plan.policy=budget", "plan.formats=speed", "plan.bpw=3.275"),
    "budget, quality": ("plan.policy=budget", "plan.formats=quality", "plan.bpw=3.275"),
    **{
        f"budget, {formats}, groups by {kind}": (
            "plan.policy=budget",
            f"plan.formats={formats}",
            "plan.bpw=3.275",
            f"plan.launch_groups={kind}",
        )
        for formats in ("speed", "quality")
        for kind in ("block", "role")
    },
    "budget, quality, 2.5 bits": ("plan.policy=budget", "plan.formats=quality", "plan.bpw=2.5"),
}
TIMED = ("gradients", "curves", "quantize")
"""Stages whose seconds the table shows; gradients and curves are made once for all rows of policy budget."""
CHECKED = ["RTN, asymmetric g64", "GPTQ, symmetric g64 + clip", "RWKVQuant, preset official", "RWKVQuant, preset rwkvq"]
CHECKED += ["budget, speed", "budget, quality"]
"""Formats and methods of every kind; the independent evaluator steps token by token and takes a minute each."""


@dataclass(frozen=True, slots=True)
class Made:
    """One quantized model and the seconds that its quantize stage took."""

    artifact: Artifact
    seconds: float


def base_settings(model: Path, folder: Path, calibration: Path, tokenizer: Path) -> dict[str, Any]:
    """What the settings of all methods have in common."""
    source = {"source": str(calibration), "tokenizer": str(tokenizer)}
    return {"model": str(model), "run_dir": str(folder), "windows": source}


def engines_of(base: dict[str, Any], made: dict[str, Made]) -> tuple[Engine, dict[str, Engine]]:
    """The float model of the settings, and the quantized ones."""
    reference = Engine(Run(parse(base, "benchmark")).checkpoint)
    return reference, {name: Engine(item.artifact) for name, item in made.items()}


def make_all(base: dict[str, Any], work: Path, methods: dict[str, tuple[str, ...]], seed: int) -> dict[str, Made]:
    """Quantize the model by every method; windows, activations and proxies are made once."""
    made = {}
    for name, overrides in methods.items():
        settings = parse(apply_overrides(base, [*overrides, f"seed={seed}"]), name)
        with Run(settings).new_pool() as pool:
            run = Run(settings, pool)
            seconds = 0.0
            for stage in stages_of(run)[: stages_of(run).index("pack") + 1]:
                begin = time.monotonic()
                run_stage(run, stage)
                seconds += time.monotonic() - begin if stage in TIMED else 0.0
        kept = work / "artifacts" / name.replace(" ", "-").replace(",", "")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(run.artifact, kept)
        made[name] = Made(open_artifact(kept), seconds)
        print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return made


def row(made: Made | None, text: TextResult, word: LambadaResult, float_word: LambadaResult) -> list[str]:
    """One line of the table, without its name."""
    bits = totals(made.artifact.plan) if made else None
    rises = np.subtract(float_word.logprobs, word.logprobs)  # nats a word, of the same examples
    rise_se = rises.std(ddof=1) / len(rises) ** 0.5
    return [
        f"{bits.matrix_bits:.3f}" if bits else "16",
        f"{bits.body_bits:.3f}" if bits else "16",
        f"{8 * made.artifact.file_bytes / bits.weights:.3f}" if made and bits else "16",
        f"{text.ppl:.3f}",
        f"{text.delta_nll:.4f} ± {text.delta_nll_se:.4f}" if text.delta_nll is not None else "",
        f"{text.kl:.4f} ± {text.kl_se:.4f}" if text.kl is not None else "",
        f"{100 * text.top1:.2f}" if text.top1 is not None else "",
        f"{word.ppl:.1f}",
        f"{rises.mean():.3f} ± {rise_se:.3f}" if made else "",
        f"{100 * word.acc:.1f}",
        f"{made.seconds:.0f}" if made else "",
    ]


HEADER = [
    "method",
    "matrix bits",
    "body bits",
    "file bits",
    "text ppl",
    "rise of ln ppl",
    "KL (nats)",
    "top-1 %",
    "LAMBADA ppl",
    "rise of ln",
    "acc %",
    "s",
    "commit",
]
CHECK_HEADER = ["exported", "ppl", "ppl, outside", "KL", "KL, outside", "KL differs by", "top-1", "top-1, outside"]


@dataclass(frozen=True, slots=True)
class Ruler:
    """An independent evaluator, and what it measures on."""

    script: Path
    model: Path
    text: Path
    tokenizer: Path
    windows: int

    def ask(self, made: Made, exported: Path) -> dict[str, Any]:
        """What it says of the exported model."""
        export_checkpoint(made.artifact, exported, dtype=torch.float32, overwrite=True)
        command = [sys.executable, str(self.script), "kl", str(self.model), str(exported), "--text", str(self.text)]
        command += ["--tokenizer", str(self.tokenizer), "--windows", str(self.windows)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        answer: dict[str, Any] = json.loads(shown)
        return answer


def check_cells(ours: TextResult, theirs: dict[str, Any]) -> list[str]:
    """Our figures beside the independent ones."""
    return [
        f"{ours.ppl:.5f}",
        f"{theirs['ppl_other']:.5f}",
        f"{ours.kl:.6f}",
        f"{theirs['kl']:.6f}",
        f"{abs((ours.kl or 0.0) / theirs['kl'] - 1):.1e}",
        f"{ours.top1:.5f}",
        f"{theirs['top1_agreement']:.5f}",
    ]


def main(
    models: Annotated[list[Path], typer.Option(help="Float checkpoints.")],
    tokenizer: Annotated[Path, typer.Option()],
    calibration: Annotated[Path, typer.Option()],
    text: Annotated[Path, typer.Option()],
    lambada_file: Annotated[Path, typer.Option("--lambada")],
    out: Annotated[Path, typer.Option()] = Path("benchmarks/quality.md"),
    work: Annotated[Path, typer.Option(help="Intermediate files.")] = Path("data/runs/benchmark-quality"),
    ruler: Annotated[Path | None, typer.Option(help="Independent evaluator.")] = None,
    check: Annotated[list[str], typer.Option(help="Methods that the independent evaluator measures again.")] = CHECKED,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods [default: all].")] = None,
    windows: Annotated[int, typer.Option()] = 64,
    seed: Annotated[int, typer.Option()] = 0,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Quality at honest bits",
    note: Annotated[str, typer.Option(help="A paragraph that the page begins with.")] = "",
) -> None:
    """Make the table."""
    kept = read_json(out.with_suffix(".json")) if out.with_suffix(".json").is_file() else {}
    for model in models:
        folder = work / model.stem
        base = base_settings(model, folder, calibration, tokenizer)
        made = make_all(base, folder, {name: METHODS[name] for name in method or METHODS}, seed)
        loaded = load_tokenizer(tokenizer)
        ids = text_windows(text.read_text(encoding="utf-8"), loaded, windows, 512, where=str(text))
        reference, engines = engines_of(base, made)
        texts = compare_on_text(reference, engines, ids)
        examples = read_examples(lambada_file, 500)
        everyone = {FLOAT: reference} | engines
        words = {name: lambada(engine, examples, loaded, batch=64) for name, engine in everyone.items()}
        commit = commit_of()
        measured = {
            named(name, seed): [*row(made.get(name), texts[name], words[name], words[FLOAT]), commit] for name in words
        }
        checks = {}
        if ruler:
            outside = Ruler(ruler, model, text, tokenizer, windows)
            exported = folder / "exported.safetensors"
            asked = [name for name in check if name in made]
            checks = {named(name, seed): check_cells(texts[name], outside.ask(made[name], exported)) for name in asked}
        known = kept.setdefault(model.stem, {"rows": {}, "checks": {}})
        known["rows"] |= measured
        known["checks"] |= checks
        write_json(out.with_suffix(".json"), kept)
        head = preamble(title, note, windows, calibration.name, text.name, lambada_file.name)
        write_text(out, head + "\n".join(section(name, found) for name, found in sorted(kept.items())))


def named(name: str, seed: int) -> str:
    """Name of a row."""
    return f"{name}, seed {seed}" if seed and name != FLOAT else name


def commit_of() -> str:
    """The commit of the code that measures, `+` if it was changed since."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def preamble(title: str, note: str, windows: int, calibration: str, text: str, examples: str) -> str:
    """What the table shows and how it was made; the last three are names of files."""
    first = f"{note}\n\n" if note else ""
    return f"""# {title}

{first}Made by `python -m benchmarks.quality` (its docstring has the command); every model is quantized before any is
evaluated. Calibration: 128 windows of 512 tokens of `{calibration}`, seed 0 unless said. Evaluation in float32
from the packed artifact: {windows} windows of 512 tokens of `{text}`, first 500 lines of
`{examples}`, disjoint from calibration. ± is one standard error over windows or examples; rises are against the
float model on the same ones. Matrix bits count every stored bit of the matrices and LoRA factors, body bits everything
but embedding and head, file bits the whole file with its header. Element-wise vectors keep their 16 bits except in
presets text, camera and official. Seconds: stage `quantize`, and where they ran `gradients` and `curves` before it
(they serve all rows of policy budget), on a shared machine of 2 cores. Commit: of the code that measured a row.

"""


def section(name: str, found: dict[str, dict[str, list[str]]]) -> str:
    """One model's tables in Markdown, rows in the order of METHODS."""
    places = {method: place for place, method in enumerate((FLOAT, *METHODS))}

    def place_of(row_name: str) -> tuple[int, str]:
        return places[row_name.partition(", seed ")[0]], row_name

    def lines(kind: str) -> list[list[str]]:
        return [[row_name, *found[kind][row_name]] for row_name in sorted(found[kind], key=place_of)]

    parts = [f"## {name}\n", markdown_table(HEADER, lines("rows"))]
    if found["checks"]:
        title = "\nThe same models, exported and measured by an independent evaluator:\n"
        parts += [title, markdown_table(CHECK_HEADER, lines("checks"))]
    return "\n".join(parts) + "\n"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, first column left-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(item) + " |" for item in rows])


if __name__ == "__main__":
    typer.run(main)
