"""Copies that leave no page of a mapped file in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rwkvq.checkpoint import pages
from rwkvq.checkpoint.pages import private_copy
from rwkvq.checkpoint.reader import open_checkpoint
from tests.tiny import write_tensors, write_tiny

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="pages are counted in /proc")
SIZE = 32 << 20


def resident_file_bytes() -> int:
    """Pages of mapped files that count as memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@linux_only
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_reading_a_checkpoint_leaves_no_page_of_it(tmp_path: Path, suffix: str) -> None:
    path = write_tiny(tmp_path / f"model{suffix}", "x070", vocab=SIZE // 256)
    source = open_checkpoint(path)
    before = resident_file_bytes()
    tensor = source.tensor("emb.weight")
    assert tensor.numel() * tensor.element_size() == SIZE
    assert resident_file_bytes() - before < SIZE // 4


@linux_only
def test_a_mapped_tensor_keeps_its_values_after_its_pages_were_dropped(tmp_path: Path) -> None:
    values = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    path = write_tensors(tmp_path / "a.pth", {"first": torch.ones(3), "a": values})
    mapped = torch.load(path, mmap=True, weights_only=True)["a"]
    assert pages._is_mapped_file(mapped)
    before = resident_file_bytes()
    assert float(mapped.sum()) and resident_file_bytes() - before > 4_000_000  # reading does fill memory
    copy = private_copy(mapped)
    assert torch.equal(copy, values) and torch.equal(mapped, values)
    assert copy.data_ptr() != mapped.data_ptr()


def test_memory_that_is_no_file_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_give_back", lambda part: pytest.fail("this would erase it"))
    values = torch.arange(1 << 20)
    assert not pages._is_mapped_file(values)
    assert torch.equal(private_copy(values), values)
    assert torch.equal(private_copy(values.view(1024, 1024).t()), values.view(1024, 1024).t())
    assert private_copy(values[:0]).shape == (0,)


@linux_only
def test_a_tensor_in_several_pieces_is_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_CHUNK", 5000)
    values = torch.randn(40_001, generator=torch.Generator().manual_seed(0)).bfloat16()
    path = write_tensors(tmp_path / "a.pth", {"a": values})
    mapped = torch.load(path, mmap=True, weights_only=True)["a"]
    assert torch.equal(private_copy(mapped), values)
