"""Quality at the file sizes of llama.cpp: its types with an importance matrix, and policy budget in no more bytes.

    python -m benchmarks.llamacpp --models rwkv7-9m.pth --models rwkv6-10m.safetensors --tokenizer tokenizer.json \
        --calibration books_calibration.txt --text books_validation.txt

The figures of llama.cpp are quoted, they were measured once (THEIRS says how); ours are made and measured here, on the
same windows. --row NAME (several times) takes only some of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.quality import Made, base_settings, engines_of, make_all, markdown_table
from rwkvq.artifact.layout import CONFIG, QUANTIZATION
from rwkvq.checkpoint.names import OUTER
from rwkvq.evaluation.divergence import TextResult, compare_on_text
from rwkvq.evaluation.perplexity import text_windows
from rwkvq.files import write_json, write_text
from rwkvq.models.tokenizer import load_tokenizer
from rwkvq.plan.bits import totals

MODELS = ("rwkv7-9m", "rwkv6-10m")
JSON_BYTES = 180_000
"""What config.json and quantization.json of an artifact of these models take at most."""
KEPT = ("plan.emb_bits=16", "plan.head_bits=16")


@dataclass(frozen=True, slots=True)
class Theirs:
    """A GGUF file of llama.cpp: bits of embedding and head, bytes of the file and KL in nats a token, by MODELS."""

    outer: str
    sizes: tuple[int, int]
    kl: tuple[float, float]


def _kept(size: int, size6: int, kl: float, kl6: float) -> Theirs:
    return Theirs("16 / 16", (size, size6), (kl, kl6))


THEIRS: Mapping[str, Theirs] = {
    "IQ2_XXS": _kept(11_189_312, 13_263_232, 0.2988, 0.1801),
    "IQ2_XS": _kept(11_336_768, 13_379_968, 0.2245, 0.1373),
    "IQ2_S": _kept(11_484_224, 13_496_704, 0.1501, 0.0965),
    "Q2_K": _kept(11_521_088, 13_525_888, 0.1740, 0.1120),
    "IQ3_XXS": _kept(11_779_136, 13_730_176, 0.0816, 0.0505),
    "Q3_K": _kept(12_000_320, 13_905_280, 0.0493, 0.0330),
    "IQ3_S": _kept(12_000_320, 13_905_280, 0.0469, 0.0295),
    "IQ4_XS": _kept(12_479_552, 14_284_672, 0.0133, 0.0105),
    "Q4_0": _kept(12_627_008, 14_401_408, 0.0160, 0.0121),
    "Q4_K": _kept(12_627_008, 14_573_440, 0.0118, 0.0078),
    "IQ3_XXS --pure": Theirs("3.06 / 3.06", (4_996_160, 6_947_200), (0.2027, 0.1564)),
    "Q3_K_S --pure": Theirs("3.44 / 3.44", (5_413_952, 7_318_912), (0.1051, 0.0839)),
    "IQ3_XXS default": Theirs("3.44 / 5.50", (5_733_440, 7_684_480), (0.1125, 0.0774)),
    "IQ3_M default": Theirs("3.44 / 6.56", (6_233_152, 8_138_112), (0.0768, 0.0546)),
    "Q3_K_M default": Theirs("3.44 / 6.56", (6_233_152, 8_138_112), (0.0771, 0.0563)),
    "Q4_K_M default": Theirs("4.50 / 6.56", (7_138_368, 9_084_800), (0.0184, 0.0132)),
}
"""Measured for this project with llama.cpp 0c1e570 (ggml 0.25.3): importance matrix of the first 128 windows of 512
tokens of books_calibration.txt; weights dequantized into the float network, KL on 64 windows of 512 tokens of
books_validation.txt. Sizes of rwkv6-10m with 16 / 16 follow from those of its other files and the widths of its types:
ffn.value, whose 896 inputs no block of 256 divides, falls back to Q4_0, IQ4_NL or (Q4_K) Q5_0."""


def gguf_tokenizer_bytes(tokenizer: Path) -> int:
    """What a GGUF file holds of a byte-level BPE tokenizer.json: tokens and merges with their lengths, token types."""
    model = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return sum(8 + len(text.encode()) for text in (*model["vocab"], *merges)) + 4 * len(model["vocab"])


def our_bytes(made: Made) -> int:
    """Bytes of the weight file, config.json and quantization.json."""
    return made.artifact.file_bytes + sum((made.artifact.path / name).stat().st_size for name in (CONFIG, QUANTIZATION))


def outer_bits(made: Made) -> str:
    """Stored bits a weight of embedding and head."""
    entries = {entry.name: entry for entry in made.artifact.plan.tensors}
    return " / ".join(f"{entries[name].stored_bits / entries[name].numel:.2f}" for name in OUTER)


HEADER = ["type", "emb / head", "bytes", "KL", "our bytes", "emb / head", "matrix bits", "our KL", "of theirs"]


def row(name: str, size: int, kl: float, made: Made, text: TextResult) -> list[str]:
    """One line: a file of llama.cpp, and ours in no more bytes. Raises ValueError if ours takes more."""
    if our_bytes(made) > size:
        raise ValueError(f"{name}: {our_bytes(made):,} bytes, at most {size:,} are meant; raise JSON_BYTES")
    ours = text.kl or 0.0
    return [
        name,
        THEIRS[name].outer,
        f"{size:,}",
        f"{kl:.4f}",
        f"{our_bytes(made):,}",
        outer_bits(made),
        f"{totals(made.artifact.plan).matrix_bits:.3f}",
        f"{ours:.5f} ± {text.kl_se or 0.0:.5f}",
        f"{ours / kl:.3f}",
    ]


def methods(sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Settings of every file of ours: free, and where theirs keeps embedding and head, with ours kept too."""
    found = {}
    for name, size in sizes.items():
        target = ("plan.policy=budget", f"plan.size={size - JSON_BYTES}B")
        found[f"free {name}"] = target
        if THEIRS[name].outer == "16 / 16":
            found[f"kept {name}"] = (*target, *KEPT)
    return found


def main(
    models: Annotated[list[Path], typer.Option(help=f"Float checkpoints named {' or '.join(MODELS)}.")],
    tokenizer: Annotated[Path, typer.Option()],
    calibration: Annotated[Path, typer.Option()],
    text: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()] = Path("benchmarks/llamacpp.md"),
    work: Annotated[Path, typer.Option(help="Intermediate files.")] = Path("data/runs/benchmark-llamacpp"),
    only: Annotated[list[str] | None, typer.Option("--row", help="Only these rows [default: all].")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make the page."""
    loaded = load_tokenizer(tokenizer)
    ids = text_windows(text.read_text(encoding="utf-8"), loaded, 64, 512, where=str(text))
    removed = gguf_tokenizer_bytes(tokenizer)
    sections = []
    for model in models:
        place, folder = MODELS.index(model.stem), work / model.stem
        base = base_settings(model, folder, calibration, tokenizer)
        sizes = {name: THEIRS[name].sizes[place] - removed for name in only or THEIRS}
        made = make_all(base, folder, methods(sizes), seed)
        texts = compare_on_text(*engines_of(base, made), ids)
        tables = {
            kind: [
                row(name, size, THEIRS[name].kl[place], made[f"{kind} {name}"], texts[f"{kind} {name}"])
                for name, size in sizes.items()
                if f"{kind} {name}" in made
            ]
            for kind in ("free", "kept")
        }
        write_json(folder / "llamacpp.json", tables)
        sections.append(section(model.stem, tables))
        write_text(out, preamble(removed, seed) + "\n".join(sections))


def preamble(removed: int, seed: int) -> str:
    """What the tables show and how they were made."""
    return f"""# llama.cpp at equal bytes

Made by `python -m benchmarks.llamacpp` (its docstring has the command). Theirs: files of llama.cpp 0c1e570 (ggml
0.25.3) with an importance matrix of 128 windows of 512 tokens of `books_calibration.txt`, measured once for this
project and quoted. Ours: policy budget with `plan.size`, calibrated on 128 windows of 512 tokens of the same text,
seed {seed}. KL: nats a token against the float model, weights only, 64 windows of 512 tokens of `books_validation.txt`;
± is one standard error over windows (theirs: 1.2 to 1.6 %).

Bytes of theirs: the whole GGUF file less the {removed:,} bytes of its tokenizer (rwkv6-10m with embedding and head at
16 bits: computed from its other files and the widths of the types). Bytes of ours: `model.safetensors`, `config.json`
and `quantization.json` (which also says why each weight got its format), everything but the tokenizer.

llama.cpp keeps embedding and head at 16 bits if it is told to, and every LoRA factor at 16 or 32 bits; on models as
small as these that is most of the file. At equal bytes our budget is free to take bits from there. So the second table
of each model has the same bytes with embedding and head of ours kept at 16 bits too: what is left is the body, where
ours also quantizes the LoRA factors. A file of ours that is smaller than asked for has the finest formats everywhere.

"""


def section(name: str, tables: Mapping[str, list[list[str]]]) -> str:
    """One model's tables in Markdown."""
    parts = [f"## {name}\n\nEmbedding and head as the budget decides:\n", markdown_table(HEADER, tables["free"])]
    if tables["kept"]:
        parts += ["\nEmbedding and head of ours kept at 16 bits:\n", markdown_table(HEADER, tables["kept"])]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    typer.run(main)
