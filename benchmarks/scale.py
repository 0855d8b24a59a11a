"""Peak memory of every stage on checkpoints of a released shape with random values, as the operating system counts it.

    python -m benchmarks.scale stages --version x060 --layers 2 --width 4096 --ffn 14336 --folder data/scale
    python -m benchmarks.scale tensor --rows 4096 --columns 14336 --method gptvq

Each stage runs in a process of its own; the peak of every process is its largest resident set (VmHWM), pages of mapped
files included. The bound is one block in float32 plus 2 GiB, for each process alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.quality import markdown_table
from benchmarks.scale_model import block_bytes, quantize_one, spec_of_shape, write_model, write_texts
from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.files import write_json
from rwkvq.run import Run
from rwkvq.settings import apply_overrides, parse
from rwkvq.stages import stages_of

SAMPLE_SECONDS = 0.1
ALLOWANCE = 2 << 30
"""Bytes a process may take beside one block."""
GB = 1e9
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


@dataclass(frozen=True, slots=True)
class Measured:
    """One stage: wall seconds, peak bytes of its own process and of each worker, and the bound."""

    stage: str
    seconds: float
    parent: int
    workers: tuple[int, ...]
    together: int
    bound: int

    @property
    def holds(self) -> bool:
        """True if no process went beyond the bound."""
        return max(self.parent, *self.workers, 0) <= self.bound

    def row(self) -> list[str]:
        """The cells of the table."""
        workers = ", ".join(f"{peak / GB:.2f}" for peak in self.workers) or "-"
        cells = [self.stage, f"{self.seconds:.1f}", f"{self.parent / GB:.2f}", workers, f"{self.together / GB:.2f}"]
        return [*cells, f"{self.bound / GB:.2f}", "yes" if self.holds else "NO"]


def measure(name: str, arguments: list[str], bound: int) -> Measured:
    """Run a command of this module in a fresh process and watch it and all its children; exits if it fails."""
    begin = time.monotonic()
    peaks: dict[int, int] = {}
    together = 0
    with subprocess.Popen([sys.executable, "-m", "benchmarks.scale", *arguments]) as process:
        while process.poll() is None:
            found = dict(sizes_of(process.pid))
            peaks |= {pid: peak for pid, (peak, _) in found.items()}
            together = max(together, sum(current for _, current in found.values()))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{name}: exit code {process.returncode}")
    seconds = time.monotonic() - begin
    parent = peaks.pop(process.pid, 0)
    return Measured(name, seconds, parent, tuple(sorted(peaks.values(), reverse=True)), together, bound)


def sizes_of(pid: int) -> list[tuple[int, tuple[int, int]]]:
    """(process id, (peak, current resident bytes)) of a process and its children; those that end are left out."""
    result = []
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            if sizes := _status(process.pid):
                result.append((process.pid, sizes))
    except psutil.Error:
        pass
    return result


def _status(pid: int) -> tuple[int, int] | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return (1024 * int(values["VmHWM"]), 1024 * int(values["VmRSS"])) if len(values) == 2 else None


@app.command()
def stages(
    folder: Annotated[Path, typer.Option(help="Where model, texts and the run are kept.")],
    version: Annotated[str, typer.Option(help="x060 or x070.")] = "x060",
    layers: int = 2,
    width: int = 4096,
    ffn: int = 14336,
    vocab: int = 65536,
    suffix: Annotated[str, typer.Option(help=".pth, .safetensors, or a folder of shards: 'shards'.")] = "shards",
    windows: int = 8,
    length: int = 256,
    workers: Annotated[int, typer.Option(help="Worker processes and threads of the stages.")] = 1,
    stage: Annotated[list[str] | None, typer.Option(help="Only these stages.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
) -> None:
    """Write a model of the given shape, run every stage in a process of its own, print and save the table."""
    assert version in ("x060", "x070")
    spec = spec_of_shape(version, layers=layers, width=width, ffn=ffn, vocab=vocab)
    model = write_model(folder, spec, suffix)
    texts = write_texts(folder, windows * length)
    values: dict[str, Any] = {
        "model": str(model),
        "run_dir": str(folder / "run"),
        "windows": {
            "source": str(texts.calibration),
            "tokenizer": str(texts.tokenizer),
            "samples": windows,
            "length": length,
            "held_out": 1,
        },
        "evaluate": {"text": str(texts.validation), "windows": windows, "length": length},
        "run": {"workers": workers, "task_timeout": 36000.0},
    }
    values = apply_overrides(values, setting or [])
    line = stages_of(Run(parse(values, "benchmarks.scale")))
    write_json(folder / "settings.json", values)
    bound = block_bytes(spec) + ALLOWANCE
    rows = []
    for name in stage or [name for name in line if name != "report"]:
        rows.append(measure(name, ["run-stage", str(folder / "settings.json"), name], bound))
        typer.echo(" | ".join(rows[-1].row()))
    _save(folder, spec, rows)


def _save(folder: Path, spec: ModelSpec, rows: list[Measured]) -> None:
    header = ["stage", "seconds", "parent GB", "workers GB", "together GB", "bound GB", "within"]
    typer.echo(f"\nOne block in float32: {block_bytes(spec) / GB:.3f} GB\n")
    typer.echo(markdown_table(header, [row.row() for row in rows]))
    write_json(folder / "scale.json", {"spec": spec.to_json(), "stages": [asdict(row) for row in rows]})
    if not all(row.holds for row in rows):
        raise SystemExit(1)


@app.command(hidden=True)
def run_stage(settings: Path, name: str) -> None:
    """Run one stage in this process."""
    from rwkvq.run import Run
    from rwkvq.stages import run_stage as run

    run(Run(parse(json.loads(settings.read_text(encoding="utf-8")), str(settings))), name)


@app.command()
def tensor(
    rows: int = 4096,
    columns: int = 14336,
    method: Annotated[str, typer.Option(help="gptq, gptvq or trellis.")] = "gptvq",
    sweeps: int = 1,
    block: Annotated[float, typer.Option(help="One block in float32, GB; the bound is 2 GiB above it.")] = 0.87,
) -> None:
    """Quantize one weight of a given shape with a second moment of its inputs, and print peak and seconds."""
    bound = int(block * GB) + ALLOWANCE
    found = measure(
        f"{method} [{rows}, {columns}]", ["run-tensor", str(rows), str(columns), method, str(sweeps)], bound
    )
    typer.echo(" | ".join(found.row()))
    if not found.holds:
        raise SystemExit(1)


@app.command(hidden=True)
def run_tensor(rows: int, columns: int, method: str, sweeps: int) -> None:
    """Quantize one weight in this process."""
    assert method in ("gptq", "gptvq", "trellis")
    quantize_one(rows, columns, method, sweeps)


if __name__ == "__main__":
    app()
