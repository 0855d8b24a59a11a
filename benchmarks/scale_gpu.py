"""Time and memory of policy budget with run.device cuda, on a checkpoint of a released shape with random values.

    python -m benchmarks.scale_gpu --folder data/scale-gpu                      # RWKV-7 7.2B: 32 blocks of width 4096
    python -m benchmarks.scale_gpu --folder data/scale-gpu --stage quantize    # only some stages, the others are there

Each stage up to the artifact runs in a process of its own. Host memory: the largest resident set of any process, pages
of mapped files included. GPU memory: what is in use on the device beyond what was before, sampled.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.quality import markdown_table
from benchmarks.scale import GB, SAMPLE_SECONDS, sizes_of
from benchmarks.scale_model import spec_of_shape, write_model, write_texts
from rwkvq.documents import read_json
from rwkvq.files import write_json
from rwkvq.run import Run
from rwkvq.settings import apply_overrides, parse
from rwkvq.stages import stages_of

HEADER = ["stage", "seconds", "host GB", "GPU GB"]


def used_on_gpu() -> int:
    """Bytes in use on the device, by any process."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(settings: Path, stage: str) -> dict[str, Any]:
    """Run a stage in a fresh process; seconds and peak bytes. Exits if it fails."""
    begin, before = time.monotonic(), used_on_gpu()
    host = gpu = 0
    with subprocess.Popen([sys.executable, "-m", "benchmarks.scale", "run-stage", str(settings), stage]) as process:
        while process.poll() is None:
            host = max([host, *(peak for _, (peak, _) in sizes_of(process.pid))])
            gpu = max(gpu, used_on_gpu() - before)
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{stage}: exit code {process.returncode}")
    return {"seconds": time.monotonic() - begin, "host": host, "gpu": gpu}


def main(
    folder: Annotated[Path, typer.Option(help="Where model, texts and the run are kept.")],
    version: Annotated[str, typer.Option(help="x060 or x070.")] = "x070",
    layers: int = 32,
    width: int = 4096,
    ffn: int = 16384,
    vocab: int = 65536,
    windows: int = 128,
    length: int = 512,
    stage: Annotated[list[str] | None, typer.Option(help="Only these stages.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
) -> None:
    """Write the model, run the stages, print the table and keep its rows in the folder."""
    assert version in ("x060", "x070")
    spec = spec_of_shape(version, layers=layers, width=width, ffn=ffn, vocab=vocab)
    model, texts = write_model(folder, spec, "shards"), write_texts(folder, 2 * windows * length)
    source = {"source": str(texts.calibration), "tokenizer": str(texts.tokenizer)}
    values: dict[str, Any] = {
        "model": str(model),
        "run_dir": str(folder / "run"),
        "windows": source | {"samples": windows, "length": length},
        "run": {"device": "cuda"},
    }
    values = apply_overrides(values, setting or [])
    settings = folder / "settings.json"
    write_json(settings, values)
    line = stages_of(Run(parse(values, "benchmarks.scale_gpu")))
    kept = folder / "scale-gpu.json"
    rows: dict[str, dict[str, Any]] = read_json(kept) if kept.is_file() else {}
    for name in stage or line[: line.index("pack") + 1]:
        rows[name] = measure(settings, name)
        write_json(kept, rows)
        typer.echo(f"{name}: {json.dumps(rows[name])}")
    typer.echo(f"\n{torch.cuda.get_device_name()}; {spec}\n")
    typer.echo(markdown_table(HEADER, [row_of(name, rows[name]) for name in line if name in rows]))
    typer.echo(f"\ntogether {sum(row['seconds'] for row in rows.values()):.0f} s")


def row_of(name: str, found: dict[str, Any]) -> list[str]:
    """The cells of a stage."""
    return [name, f"{found['seconds']:.1f}", f"{found['host'] / GB:.2f}", f"{found['gpu'] / GB:.2f}"]


if __name__ == "__main__":
    typer.run(main)
