"""One run: its settings, its folder, and where every stage keeps its files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rwkvq.checkpoint.reader import Checkpoint, open_checkpoint
from rwkvq.errors import TextError, TokenizerError
from rwkvq.files import sha256_of_file
from rwkvq.settings import Settings
from rwkvq.workers import WorkerPool

BLOCKS_ON_GPU = 3
"""Blocks that a GPU works on at once: while one is at its widest weight, column by column, most of the GPU is idle."""
LINE = (
    "windows",
    "activations",
    "proxies",
    "gradients",
    "curves",
    "plan",
    "quantize",
    "distill",
    "pack",
    "evaluate",
    "report",
)
"""Every stage, in the order of the line."""
SHARED = ("windows", "activations", "proxies", "gradients", "curves")
"""Stages whose outputs do not depend on the policy, so that runs of one model may have them in one folder."""


@dataclass(frozen=True)
class Run:
    """Settings and the files they name. Relative paths are relative to the working directory."""

    settings: Settings
    pool: WorkerPool | None = None
    """Worker processes that are up already; None = stage `quantize` starts its own."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.settings.run_dir)

    def folder_of(self, stage: str) -> Path:
        """Where a stage keeps its outputs and its manifest: the run folder, or the shared one of the settings."""
        shared = self.settings.shared_dir
        return Path(shared) if shared and stage in SHARED else self.folder

    @property
    def model_path(self) -> Path:
        """The float checkpoint."""
        return Path(self.settings.model)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer file."""
        return Path(self.settings.windows.tokenizer)

    @property
    def windows(self) -> Path:
        """Output of stage `windows`."""
        return self.folder_of("windows") / "windows.parquet"

    @property
    def activations(self) -> Path:
        """Output folder of stage `activations`."""
        return self.folder_of("activations") / "activations"

    @property
    def proxies(self) -> Path:
        """Output of stage `proxies`."""
        return self.folder_of("proxies") / "proxies.parquet"

    @property
    def gradients(self) -> Path:
        """Output folder of stage `gradients`."""
        return self.folder_of("gradients") / "gradients"

    @property
    def curves(self) -> Path:
        """Output of stage `curves`."""
        return self.folder_of("curves") / "curves.parquet"

    @property
    def plan(self) -> Path:
        """Output of stage `plan`."""
        return self.folder / "plan.json"

    @property
    def quantized(self) -> Path:
        """Output folder of stage `quantize`."""
        return self.folder / "quantized"

    @property
    def distilled(self) -> Path:
        """Output of stage `distill`: the vectors."""
        return self.folder / "distilled.safetensors"

    @property
    def distillation(self) -> Path:
        """Output of stage `distill`: its curve."""
        return self.folder / "distillation.json"

    @property
    def artifact(self) -> Path:
        """Output folder of stage `pack`."""
        return self.folder / "artifact"

    @property
    def evaluation(self) -> Path:
        """Output folder of stage `evaluate`."""
        return self.folder / "evaluation"

    @property
    def report(self) -> Path:
        """Output of stage `report`: the page."""
        return self.folder / "report.html"

    @property
    def metrics(self) -> Path:
        """Output of stage `report`: the flat figures that DVC compares."""
        return self.folder / "metrics.json"

    def timings(self, stage: str) -> Path:
        """File with the seconds that a stage took the last time; no output, since times differ from run to run."""
        return self.folder_of(stage) / "timings.json"

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The opened checkpoint. Raises CheckpointError."""
        return open_checkpoint(self.model_path)

    @property
    def workers(self) -> int:
        """Parallel block jobs: run.workers, or as the cores allow with run.threads threads each, or as fill a GPU."""
        run = self.settings.run
        return run.workers or (BLOCKS_ON_GPU if run.device == "cuda" else self.processor_workers)

    def new_pool(self, jobs: int | None = None) -> WorkerPool:
        """Worker processes for as many block jobs at once, `jobs` at most; those on a GPU share one process."""
        run = self.settings.run
        workers = self.workers if jobs is None else max(1, min(self.workers, jobs))
        return WorkerPool(workers, run.threads, one_process=run.device == "cuda")

    @property
    def processor_workers(self) -> int:
        """Blocks that are worked on at once where no GPU helps: run.workers, or as many as the cores allow."""
        run = self.settings.run
        return run.workers or max(1, cores() // run.threads)


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def text_hash(source: str) -> str:
    """Hash of a text file, or the name itself for a named data set. Raises TextError if a file is missing."""
    path = Path(source)
    if path.is_file():
        return sha256_of_file(path)
    if path.suffix:
        raise TextError(f"{source}: no such file; give a .txt, .jsonl or .parquet file or the name of a data set")
    return f"dataset:{source}"


def tokenizer_hash(path: Path) -> str:
    """Hash of the tokenizer file. Raises TokenizerError if it is missing."""
    if not path.is_file():
        raise TokenizerError(f"{path}: no such file; give a tokenizer.json or the RWKV World vocabulary (.txt)")
    return sha256_of_file(path)
