"""Time and memory of `rwkvq quantize`, and what a second worker brings: ratios within one run.

    python -m benchmarks.speed --model rwkv7-9m.pth --model rwkv7-26m --tokenizer tokenizer.json --calibration books.txt

The whole command runs as its own process; memory is sampled as the sum of unique set sizes of the process and all its
children. Then stage `quantize` alone runs with one and with two workers in turn, and the bytes of both are compared.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks.quality import markdown_table
from rwkvq.files import write_text
from rwkvq.run import Run
from rwkvq.settings import Settings, parse
from rwkvq.stages import run_stage
from rwkvq.workers import WorkerPool

SAMPLE_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Whole:
    """One run of the whole command: wall and CPU seconds, peak bytes of all its processes and of the largest."""

    wall: float
    cpu: float
    peak_together: int
    peak_largest: int


def run_whole(model: Path, tokenizer: Path, calibration: Path, folder: Path) -> Whole:
    """Run `rwkvq quantize` with the default policy."""
    command = [sys.executable, "-m", "rwkvq.cli", "quantize", str(model), "--out", str(folder / "out")]
    command += ["--calibration", str(calibration), "--tokenizer", str(tokenizer)]
    before = os.times()
    begin = time.monotonic()
    together = largest = 0
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            sizes = _unique_sizes(process.pid)
            together, largest = max(together, sum(sizes)), max(largest, *sizes, 0)
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Whole(time.monotonic() - begin, cpu, together, largest)


def _unique_sizes(pid: int) -> list[int]:
    """Unique set sizes, bytes, of a process and its children; those that end meanwhile are left out."""
    sizes = [0]
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            sizes.append(process.memory_full_info().uss)
    except psutil.Error:
        pass
    return sizes


def time_quantize(settings: Settings, workers: int) -> tuple[float, str]:
    """Seconds of stage `quantize` alone on `workers` idle worker processes, and a hash of every byte it wrote."""
    limited = settings.model_copy(update={"run": settings.run.model_copy(update={"workers": workers})})
    with WorkerPool(workers, 1) as pool:
        run = Run(limited, pool)
        time.sleep(8)  # workers import torch; what is compared is the work
        shutil.rmtree(run.quantized, ignore_errors=True)
        (run.folder / "manifests" / "quantize.json").unlink(missing_ok=True)
        begin = time.monotonic()
        run_stage(run, "quantize")
        seconds = time.monotonic() - begin
    digest = hashlib.sha256()
    for path in sorted(run.quantized.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return seconds, digest.hexdigest()


def main(
    model: Annotated[list[Path], typer.Option(help="Float checkpoints.")],
    tokenizer: Annotated[Path, typer.Option()],
    calibration: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()] = Path("benchmarks/speed.md"),
    pairs: Annotated[int, typer.Option(help="Pairs of runs with one and two workers.")] = 2,
) -> None:
    """Make the tables."""
    whole, ratios = [], []
    for path in model:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = run_whole(path, tokenizer, calibration, folder)
            sizes = f"{found.peak_together / 1e9:.2f}", f"{found.peak_largest / 1e9:.2f}"
            whole.append([path.stem, f"{found.wall:.0f}", f"{found.cpu:.0f}", *sizes])
            print(whole[-1], file=sys.stderr, flush=True)
            values = {
                "model": str(path),
                "run_dir": str(folder / "run"),
                "windows": {"source": str(calibration), "tokenizer": str(tokenizer)},
            }
            settings = parse(values, "benchmark")
            for stage in ("windows", "activations", "proxies", "plan"):
                run_stage(Run(settings), stage)
            for _ in range(pairs):
                (one, first), (two, second) = time_quantize(settings, 1), time_quantize(settings, 2)
                same = "equal" if first == second else "DIFFERENT"
                ratios.append([path.stem, f"{one:.1f}", f"{two:.1f}", f"{one / two:.2f}", same])
                print(ratios[-1], file=sys.stderr, flush=True)
    cores = len(os.sched_getaffinity(0))
    write_text(out, _page(cores, whole, ratios))


def _page(cores: int, whole: list[list[str]], ratios: list[list[str]]) -> str:
    return f"""# Time and memory of quantization

Made by `python -m benchmarks.speed` (its docstring has the command) on {cores} cores of a shared machine; times on such
a machine vary, ratios less. Default policy and settings, 128 windows of 512 tokens.

The whole `rwkvq quantize` command, imports included; GB are unique memory of all its processes together and of the
largest:

{markdown_table(["model", "wall s", "CPU s", "GB together", "GB largest"], whole)}

Stage `quantize` alone, one and two workers in turn:

{markdown_table(["model", "1 worker, s", "2 workers, s", "ratio", "bytes"], ratios)}
"""


if __name__ == "__main__":
    typer.run(main)
