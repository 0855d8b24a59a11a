"""The .safetensors layout and the export of plain checkpoints."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rwkvq.checkpoint import writer
from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.checkpoint.spec import Version
from rwkvq.checkpoint.writer import export_checkpoint, write_safetensors
from rwkvq.errors import CheckpointError, OutputError
from tests.tiny import tiny_tensors, write_tensors, write_tiny

TENSORS: dict[str, Tensor] = {
    "codes": torch.arange(7, dtype=torch.uint8),
    "scale": torch.randn(3, 1, generator=torch.Generator().manual_seed(0)).half(),
    "single": torch.tensor([1.5, -2.5]),
    "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
    "scalar": torch.tensor(-5, dtype=torch.int64),
    "book é\n": torch.tensor([[-128, 127]], dtype=torch.int8),
}
ENTRIES = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def _write(path: Path, tensors: dict[str, Tensor]) -> bytes:
    write_safetensors(path, ENTRIES, tensors.items(), {"format": "test/1", "a": "b"})
    return path.read_bytes()


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    _write(tmp_path / "a.safetensors", TENSORS)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "test/1", "a": "b"}
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            found = file.get_tensor(name)
            assert torch.equal(found, tensor) and found.dtype == tensor.dtype and found.shape == tensor.shape


def test_layout_is_aligned_and_without_gaps(tmp_path: Path) -> None:
    data = _write(tmp_path / "a.safetensors", TENSORS)
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 64 == 0
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    end = 0
    for name, entry in header.items():
        begin, new_end = entry["data_offsets"]
        assert begin == end and begin % TENSORS[name].element_size() == 0
        end = new_end
    assert 8 + length + end == len(data)


def test_bytes_do_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    forward = _write(tmp_path / "a.safetensors", TENSORS)
    assert forward == _write(tmp_path / "b.safetensors", dict(reversed(TENSORS.items())))


def test_only_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    path, sizes = tmp_path / "a.safetensors", []

    def one_by_one() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in TENSORS.items():
            sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
            yield name, tensor

    write_safetensors(path, ENTRIES, one_by_one(), {})
    assert len(sizes) == len(TENSORS) and not [file for file in tmp_path.iterdir() if file != path]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": torch.zeros(3, 1)}, "scale .* was not announced"),
        ({"codes": torch.zeros(8, dtype=torch.uint8)}, "codes .* was not announced"),
        ({"other": torch.zeros(1)}, "other .* was not announced"),
    ],
)
def test_tensor_that_differs_from_its_entry(tmp_path: Path, changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _write(tmp_path / "a.safetensors", TENSORS | changed)
    assert list(tmp_path.iterdir()) == []


def test_tensor_that_never_comes_or_comes_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="not given: single"):
        write_safetensors(path, ENTRIES, ((n, t) for n, t in TENSORS.items() if n != "single"), {})
    with pytest.raises(ValueError, match=r"codes .* was not announced"):
        write_safetensors(path, ENTRIES, [("codes", TENSORS["codes"])] * 2, {})
    with pytest.raises(ValueError, match="twice"):
        write_safetensors(path, [*ENTRIES, ENTRIES[0]], TENSORS.items(), {})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_write_data", full)
    with pytest.raises(OutputError, match="the disk is full"):
        _write(tmp_path / "a.safetensors", TENSORS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_export_gives_the_same_model(tmp_path: Path, version: Version, suffix: str) -> None:
    source = open_checkpoint(write_tiny(tmp_path / "model.pth", version))
    exported = tmp_path / f"exported{suffix}"
    export_checkpoint(source, exported, dtype=None, overwrite=False)
    copy = open_checkpoint(exported)
    assert copy.spec == source.spec and copy.names() == source.names()
    for name in source.names():
        assert torch.equal(copy.tensor(name), source.tensor(name)) and copy.shape(name) == source.shape(name)
    first = exported.read_bytes()
    export_checkpoint(source, exported, dtype=None, overwrite=True)
    assert exported.read_bytes() == first


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export_casts(tmp_path: Path, suffix: str) -> None:
    source = open_checkpoint(write_tiny(tmp_path / "model.pth", "x070"))
    export_checkpoint(source, tmp_path / f"half{suffix}", dtype=torch.float16, overwrite=False)
    copy = open_checkpoint(tmp_path / f"half{suffix}")
    assert {copy.dtype(name) for name in copy.names()} == {torch.float16}
    assert torch.equal(copy.tensor("emb.weight"), source.tensor("emb.weight").half())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export_refuses(tmp_path: Path, suffix: str) -> None:
    tensors = tiny_tensors("x070", dtype=torch.float32)
    tensors["ln_out.bias"][3] = 1e6
    source, out = open_checkpoint(write_tensors(tmp_path / "model.pth", tensors)), tmp_path / f"out{suffix}"
    with pytest.raises(OutputError, match=r"ln_out\.bias has values too large for torch\.float16"):
        export_checkpoint(source, out, dtype=torch.float16, overwrite=False)
    assert not out.exists()
    export_checkpoint(source, out, dtype=torch.bfloat16, overwrite=False)
    with pytest.raises(OutputError, match="already exists"):
        export_checkpoint(source, out, dtype=None, overwrite=False)
    with pytest.raises(OutputError, match="unknown kind of file"):
        export_checkpoint(source, tmp_path / "out.gguf", dtype=None, overwrite=False)


def test_export_of_pth_to_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullFile:
        def __init__(self, file: IO[bytes]) -> None:
            self.room = 50_000

        def write(self, data: bytes) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

    source, kept = open_checkpoint(write_tiny(tmp_path / "model.pth", "x070")), writer._RememberingFile
    monkeypatch.setattr(writer, "_RememberingFile", lambda file: kept(FullFile(file)))
    with pytest.raises(OutputError, match="the disk is full"):
        export_checkpoint(source, tmp_path / "out.pth", dtype=None, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


def test_export_of_a_damaged_model_leaves_nothing(tmp_path: Path) -> None:
    tensors = tiny_tensors("x070")
    tensors["head.weight"][0, 0] = float("nan")
    source = open_checkpoint(write_tensors(tmp_path / "model.pth", tensors))
    with pytest.raises(CheckpointError, match=r"head\.weight holds NaN"):
        export_checkpoint(source, tmp_path / "out.safetensors", dtype=None, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
