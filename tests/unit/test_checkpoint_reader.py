"""Reading good checkpoints: both kinds of file, shards, prefixes, vectors of either shape, memory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.checkpoint.spec import Version
from rwkvq.errors import CheckpointError
from rwkvq.files import sha256_of_file
from rwkvq.tensors import is_finite
from tests.tiny import tiny_spec, tiny_tensors, write_tensors, write_tiny


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_tensors_come_back(tmp_path: Path, version: Version, suffix: str) -> None:
    path = write_tiny(tmp_path / f"model{suffix}", version)
    checkpoint = open_checkpoint(path)
    expected = tiny_tensors(version)
    assert checkpoint.spec == tiny_spec(version)
    assert checkpoint.names() == list(expected)
    for name, tensor in expected.items():
        found = checkpoint.tensor(name)
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype == checkpoint.dtype(name)
        assert checkpoint.shape(name) == tuple(tensor.shape)


@pytest.mark.parametrize("prefix", ["model.", "rwkv7.", "rwkv."])
def test_prefix_is_stripped(tmp_path: Path, prefix: str) -> None:
    tensors = tiny_tensors("x070")
    named = {name if name == "head.weight" else prefix + name: tensor for name, tensor in tensors.items()}
    checkpoint = open_checkpoint(write_tensors(tmp_path / "model.pth", named))
    assert checkpoint.names() == list(tensors)
    assert torch.equal(checkpoint.tensor("emb.weight"), tensors["emb.weight"])


def test_vectors_may_be_flat(tmp_path: Path) -> None:
    tensors = tiny_tensors("x060")
    flat = {name: tensor.reshape(-1) if tensor.shape[:2] == (1, 1) else tensor for name, tensor in tensors.items()}
    checkpoint = open_checkpoint(write_tensors(tmp_path / "model.safetensors", flat))
    assert checkpoint.shape("blocks.0.att.time_maa_x") == (128,)


def test_unused_tensors_are_accepted_and_left_out(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tensors(tmp_path / "model.pth", tiny_tensors("x070", with_unused=True)))
    assert checkpoint.unused == ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
    assert not set(checkpoint.unused) & set(checkpoint.names())
    with pytest.raises(CheckpointError, match=r"blocks\.0\.att\.v1"):
        checkpoint.tensor("blocks.0.att.v1")


def test_shards_with_and_without_index(tmp_path: Path) -> None:
    tensors = tiny_tensors("x070")
    names = list(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: files[number % 2] for number, name in enumerate(names)}
    for file in files:
        write_tensors(tmp_path / file, {name: tensors[name] for name in names if weight_map[name] == file})
    without = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    indexed = open_checkpoint(tmp_path)
    assert without.names() == indexed.names() == names
    assert all(torch.equal(indexed.tensor(name), tensors[name]) for name in names)
    assert without.identity() == indexed.identity()


def test_identity_is_the_hash_of_the_bytes(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model.safetensors", "x060")
    assert open_checkpoint(path).identity() == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of_file(path)
    other = write_tiny(tmp_path / "other.safetensors", "x060", seed=1)
    assert open_checkpoint(other).identity() != open_checkpoint(path).identity()


def test_legacy_pth_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(tiny_tensors("x070"), path, _use_new_zipfile_serialization=False)
    assert torch.equal(open_checkpoint(path).tensor("head.weight"), tiny_tensors("x070")["head.weight"])


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_opening_maps_the_file_and_loads_nothing(tmp_path: Path, suffix: str) -> None:
    path = write_tiny(tmp_path / f"model{suffix}", "x070", vocab=65536)
    assert path.stat().st_size > 32 << 20
    before = _status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    checkpoint = open_checkpoint(path)
    checkpoint.tensor("blocks.1.att.key.weight")
    assert _status("VmHWM:") - before < 12 << 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_is_finite_sees_a_single_value(value: float, dtype: torch.dtype) -> None:
    tensor = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor) and is_finite(tensor[:0])
    tensor[2, 4] = value
    assert not is_finite(tensor)
