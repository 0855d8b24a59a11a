"""Commands that write something from a model: `export`, `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rwkvq.cli.display import console, stage_bars


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command()(export)
    app.command()(generate)


def export(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder (or a checkpoint, to change its file format).")],
    out: Annotated[Path, typer.Argument(help="A .pth or .safetensors file to write, in the released naming.")],
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, or stored.")] = "float32",
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
) -> None:
    """Dequantize into a plain checkpoint that any RWKV runtime reads."""
    import torch

    from rwkvq.checkpoint.writer import export_checkpoint
    from rwkvq.engine.model import open_model

    types = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "stored": None}
    if dtype not in types:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(types)}", param_hint="--dtype")
    export_checkpoint(open_model(artifact), out, dtype=types[dtype], overwrite=overwrite)
    console.print(f"wrote {out}")


def generate(
    model: Annotated[Path, typer.Argument(help="An artifact folder or a checkpoint.")],
    prompt: Annotated[str | None, typer.Option(help="Continue this text and print it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Sample calibration texts into this .jsonl instead.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer file [default: the artifact's].")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens a text.", min=1)] = 200,
    samples: Annotated[int, typer.Option(help="Texts to sample with --out.", min=1)] = 16,
    temperature: Annotated[float, typer.Option(help="0 = always the likeliest token.", min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus probability.", min=0.0, max=1.0)] = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Sample text from a model: to look at it, or as calibration text where there is none."""
    if (prompt is None) == (out is None):
        raise typer.BadParameter("give either --prompt or --out")
    from rwkvq.engine.generate import continue_text, write_samples

    if prompt is not None:
        text = continue_text(model, tokenizer, prompt, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed)
        print(prompt + text)
        return
    assert out is not None
    with stage_bars() as bars:
        write_samples(
            model,
            tokenizer,
            out,
            samples=samples,
            tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            progress=bars("generate"),
        )
    console.print(f"wrote {samples} texts of {tokens} tokens to {out}")
