"""From a text file to the statistics of every block, for both versions; killed in the middle and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rwkvq.calibration.activations import read_block, write_activations
from rwkvq.calibration.disjoint import shared_shingles
from rwkvq.calibration.statistics import collect
from rwkvq.calibration.windows import build_windows, read_windows, write_windows
from rwkvq.checkpoint.names import weights_of
from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.models import load_block
from rwkvq.settings import ActivationsSettings, WindowsSettings
from tests.tiny import write_byte_vocabulary, write_tiny

WORDS = ["the", "river", "stone", "and", "a", "light", "over", "old", "walls", "ran", "slowly", "down"]


def write_text(path: Path, words: int, step: int) -> Path:
    path.write_text(
        " ".join(WORDS[(index * index * step + index) % len(WORDS)] + str(index % 97) for index in range(words))
    )
    return path


def write_windows_of(folder: Path) -> Path:
    write_byte_vocabulary(folder / "bytes.txt")
    write_text(folder / "a.txt", 900, 7)
    settings = WindowsSettings(source="a.txt", tokenizer="bytes.txt", samples=10, length=64, held_out=2)
    write_windows(build_windows(settings, seed=3, vocab=320, base_dir=folder), folder / "windows.parquet")
    return folder / "windows.parquet"


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_from_text_to_statistics(tmp_path: Path, version: str) -> None:
    windows = read_windows(write_windows_of(tmp_path))
    source = open_checkpoint(write_tiny(tmp_path / "model.pth", version, width=64))
    write_activations(source, windows, tmp_path / "activations", ActivationsSettings(batch=5), workers=2)
    weights = weights_of(source.spec, {name: source.shape(name) for name in source.names()})
    for block in range(source.spec.layers):
        wanted = [weight for weight in weights if weight.block == block]
        batches = read_block(tmp_path / "activations", block, model_sha256=source.identity())
        found = collect(source.spec, block, load_block(source, block), batches, wanted)
        assert (found.tokens, found.held_out) == (640, 2)
        for weight in wanted:
            if weight.weight_class in ("matrix", "lora"):
                moment = found.second_moments[str(weight.site)]
                assert moment.shape == (weight.shape[1],) * 2
                assert torch.linalg.eigvalsh(moment.double()).min() > -1e-5 * moment.diagonal().max()
            elif weight.weight_class == "elementwise":
                assert found.importance[weight.name].shape == weight.shape
                assert (found.importance[weight.name] > 0).all()


def test_an_evaluation_text_that_quotes_the_calibration_text_is_caught(tmp_path: Path) -> None:
    calibration = read_windows(write_windows_of(tmp_path))
    quoted = (tmp_path / "a.txt").read_text()[50:]
    (tmp_path / "b.txt").write_text("x" * 57 + quoted)
    settings = WindowsSettings(source="b.txt", tokenizer="bytes.txt", samples=60, length=64, held_out=0)
    evaluation = build_windows(settings, seed=0, vocab=320, base_dir=tmp_path)
    # no window is equal to another, because of the shift; the runs are
    assert not set(calibration.hashes) & set(evaluation.hashes)
    assert shared_shingles(calibration.ids, evaluation.ids).shared > 100
    (tmp_path / "b.txt").write_text("".join(chr(97 + (i * i * i) % 23) for i in range(4000)))
    other = build_windows(settings, seed=0, vocab=320, base_dir=tmp_path)
    assert shared_shingles(calibration.ids, other.ids).shared == 0


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from rwkvq.calibration import activations
from rwkvq.calibration.windows import read_windows
from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.settings import ActivationsSettings
torch.set_num_threads(1)
run_block = activations.run_block
def slowly(spec, block, *rest, **named):
    if block == 2:
        (Path(sys.argv[1]) / "at block 2").touch()
        time.sleep(600)
    return run_block(spec, block, *rest, **named)
activations.run_block = slowly
folder = Path(sys.argv[1])
source, windows = open_checkpoint(folder / "model.pth"), read_windows(folder / "windows.parquet")
activations.write_activations(source, windows, folder / "activations", ActivationsSettings(batch=2))
"""


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    windows = read_windows(write_windows_of(tmp_path))
    source = open_checkpoint(write_tiny(tmp_path / "model.pth", "x070", layers=4, width=64))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)])
    while not (tmp_path / "at block 2").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    folder = tmp_path / "activations"
    finished = {path.name for path in folder.glob("[!.]*")}
    assert finished == {"block-000.parquet", "block-001.parquet", "block-002.parquet", "v_first.parquet"}
    times = {name: (folder / name).stat().st_mtime_ns for name in finished}
    files = write_activations(source, windows, folder, ActivationsSettings(batch=2))
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == times
    write_activations(source, windows, tmp_path / "whole", ActivationsSettings(batch=2))
    for path in files:
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
