"""The activation cache: right values, rebuilt file by file, the same bytes however it comes about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rwkvq.calibration import activations
from rwkvq.calibration.activations import (
    block_path,
    cache_windows,
    estimate_cache_bytes,
    read_block,
    write_activations,
)
from rwkvq.calibration.windows import Windows, model_inputs
from rwkvq.checkpoint.reader import Checkpoint, open_checkpoint
from rwkvq.errors import ActivationError, CheckpointError
from rwkvq.files import sha256_of_bytes
from rwkvq.models import embed, load_block, run_block
from rwkvq.settings import ActivationsSettings
from tests.tiny import tiny_tensors, write_tensors

VERSIONS = ("x060", "x070")
SETTINGS = ActivationsSettings(batch=2)


def made_up_windows(count: int = 5, length: int = 24, *, seed: int = 0, held_out: int = 1) -> Windows:
    ids = np.random.default_rng(seed).integers(1, 320, (count, length)).astype(np.int32)
    flags = np.arange(count) < held_out
    hashes = tuple(sha256_of_bytes(row.tobytes()) for row in ids)
    return Windows(ids, np.arange(count) * length, flags, hashes, "made up", "", "", seed)


def checkpoint(folder: Path, version: str, *, layers: int = 3, scale: float = 1.0, seed: int = 0) -> Checkpoint:
    tensors = tiny_tensors(version, layers=layers, width=64, seed=seed)
    for block in range(layers):
        tensors[f"blocks.{block}.ffn.value.weight"] *= scale
    return open_checkpoint(write_tensors(folder / f"{version}-{layers}-{scale}-{seed}.safetensors", tensors))


def inputs_of(source: Checkpoint, folder: Path, block: int, batch: int = 2) -> Tensor:
    batches = read_block(folder, block, model_sha256=source.identity(), batch=batch)
    return torch.cat([part.x for part in batches])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def float_inputs(source: Checkpoint, windows: Windows) -> tuple[list[Tensor], Tensor | None]:
    """The inputs of all blocks without any rounding, and v_first."""
    ids = torch.from_numpy(model_inputs(windows.ids)).long()
    emb, weight, bias = (
        source.tensor(f"{name}") for name in ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias")
    )
    inputs, v_first = [embed(emb, weight.float(), bias.float(), ids)], None
    for block in range(source.spec.layers - 1):
        x, _, v_first = run_block(source.spec, block, load_block(source, block), inputs[-1], v_first=v_first)
        inputs.append(x)
    return inputs, v_first


@pytest.mark.parametrize("version", VERSIONS)
def test_the_cache_holds_the_float_model_to_float16(tmp_path: Path, version: str) -> None:
    source, windows, folder = checkpoint(tmp_path, version), made_up_windows(), tmp_path / "cache"
    files = write_activations(source, windows, folder, SETTINGS)
    v_file = ["v_first.parquet"] if version == "x070" else []
    assert sorted(path.name for path in files) == [f"block-00{block}.parquet" for block in range(3)] + v_file
    expected, v_first = float_inputs(source, windows)
    for block, wanted in enumerate(expected):
        found = inputs_of(source, folder, block)
        # float16 keeps 11 bits; a few roundings on the way down
        assert (found - wanted).norm() < 4e-4 * (block + 1) * wanted.norm()
    batches = list(read_block(folder, 2, model_sha256=source.identity()))
    if v_first is None:
        assert all(batch.v_first is None for batch in batches)
    else:
        found = torch.cat([batch.v_first for batch in batches])
        assert (found - v_first).norm() < 1e-3 * v_first.norm()


def test_block_zero_has_no_v_first(tmp_path: Path) -> None:
    source, folder = checkpoint(tmp_path, "x070"), tmp_path / "cache"
    write_activations(source, made_up_windows(), folder, SETTINGS)
    assert all(batch.v_first is None for batch in read_block(folder, 0, model_sha256=source.identity()))


def test_a_model_of_one_block_needs_no_v_first(tmp_path: Path) -> None:
    source, folder = checkpoint(tmp_path, "x070", layers=1), tmp_path / "cache"
    files = write_activations(source, made_up_windows(), folder, SETTINGS)
    assert files == [block_path(folder, 0)]


def test_held_out_windows_are_marked_and_can_be_dropped(tmp_path: Path) -> None:
    source, folder = checkpoint(tmp_path, "x070"), tmp_path / "cache"
    write_activations(source, made_up_windows(held_out=3), folder, SETTINGS)
    batches = list(read_block(folder, 1, model_sha256=source.identity(), batch=2))
    assert torch.cat([batch.held_out for batch in batches]).tolist() == [True, True, True, False, False]
    assert [len(batch.without_held_out().x) for batch in batches] == [0, 1, 1]
    mixed = batches[1].without_held_out()
    assert torch.equal(mixed.x, batches[1].x[1:])
    assert mixed.v_first is not None
    assert torch.equal(mixed.v_first, batches[1].v_first[1:])


def test_workers_change_no_byte(tmp_path: Path) -> None:
    source, windows = checkpoint(tmp_path, "x070"), made_up_windows(7)
    for workers in (1, 3):
        write_activations(source, windows, tmp_path / str(workers), SETTINGS, workers=workers)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "3")


def test_a_finished_cache_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, windows, folder = checkpoint(tmp_path, "x070"), made_up_windows(), tmp_path / "cache"
    write_activations(source, windows, folder, SETTINGS)
    monkeypatch.setattr(activations, "load_block", lambda *_: pytest.fail("a block was run again"))
    seen: list[int] = []
    write_activations(source, windows, folder, SETTINGS, on_block=seen.append)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("name", ["block-000", "block-001", "block-002", "v_first"])
def test_a_damaged_file_is_named_and_only_it_is_rebuilt(tmp_path: Path, name: str) -> None:
    source, windows, folder = checkpoint(tmp_path, "x070"), made_up_windows(), tmp_path / "cache"
    write_activations(source, windows, folder, SETTINGS)
    before, damaged = bytes_of(folder), folder / f"{name}.parquet"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 0x40
    damaged.write_bytes(data)
    block = {"block-000": 0, "block-001": 1}.get(name, 2)
    with pytest.raises(ActivationError) as caught:
        list(read_block(folder, block, model_sha256=source.identity()))
    message = str(caught.value)
    assert message.startswith(f"{damaged}: damaged")
    assert "run the activations stage again" in message
    assert "\n" not in message
    write_activations(source, windows, folder, SETTINGS)
    assert bytes_of(folder) == before
    rewritten = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != times[path.name]}
    # block 0 gives both the input of block 1 and v_first
    together = {"block-001.parquet", "v_first.parquet"}
    assert rewritten == (together if damaged.name in together else {damaged.name})


@pytest.mark.parametrize("version", VERSIONS)
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    source, windows = checkpoint(tmp_path, version, layers=4), made_up_windows()
    write_activations(source, windows, tmp_path / "whole", SETTINGS)
    calls: list[int] = []

    def run_and_stop(spec: object, block: int, *rest: object, **named: object) -> object:
        calls.append(block)
        if block == 1 and calls.count(1) == 2:
            raise KeyboardInterrupt
        return run_block(spec, block, *rest, **named)

    folder = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(activations, "run_block", run_and_stop)
        with pytest.raises(KeyboardInterrupt):
            write_activations(source, windows, folder, SETTINGS)
    v_file = ["v_first.parquet"] if version == "x070" else []
    assert [path.name for path in sorted(folder.iterdir())] == ["block-000.parquet", "block-001.parquet", *v_file]
    write_activations(source, windows, folder, SETTINGS)
    assert bytes_of(folder) == bytes_of(tmp_path / "whole")


def test_another_model_or_other_windows_replace_the_cache(tmp_path: Path) -> None:
    source, windows, folder = checkpoint(tmp_path, "x060"), made_up_windows(), tmp_path / "cache"
    write_activations(source, windows, folder, SETTINGS)
    assert cache_windows(folder) == windows.identity()
    other = checkpoint(tmp_path, "x060", seed=1)
    with pytest.raises(ActivationError, match="belongs to another model"):
        inputs_of(other, folder, 1)
    write_activations(other, windows, folder, SETTINGS)
    inputs_of(other, folder, 1)
    swapped = made_up_windows(held_out=2)
    write_activations(other, swapped, folder, SETTINGS)
    assert cache_windows(folder) == swapped.identity()


def test_blocks_of_different_windows_do_not_mix(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, "x070")
    for seed in (0, 1):
        write_activations(source, made_up_windows(seed=seed), tmp_path / str(seed), SETTINGS)
    for name in ("block-002", "v_first"):
        folder = tmp_path / f"mixed-{name}"
        folder.mkdir()
        for file, data in bytes_of(tmp_path / "0").items():
            (folder / file).write_bytes(data)
        (folder / f"{name}.parquet").write_bytes((tmp_path / "1" / f"{name}.parquet").read_bytes())
        with pytest.raises(ActivationError, match=rf"{name}\.parquet: belongs to other windows"):
            inputs_of(source, folder, 2)


def test_changed_code_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, windows, folder = checkpoint(tmp_path, "x060"), made_up_windows(), tmp_path / "cache"
    write_activations(source, windows, folder, SETTINGS)
    monkeypatch.setattr(activations, "code_version", lambda _: "edited")
    with pytest.raises(ActivationError, match="another version of this program"):
        inputs_of(source, folder, 0)
    write_activations(source, windows, folder, SETTINGS)
    inputs_of(source, folder, 0)


def test_large_activations_are_kept_in_float32(tmp_path: Path) -> None:
    source, windows, folder = checkpoint(tmp_path, "x070", scale=1e5), made_up_windows(), tmp_path / "cache"
    write_activations(source, windows, folder, SETTINGS)
    expected, _ = float_inputs(source, windows)
    assert expected[1].abs().max() > 65_504
    found = inputs_of(source, folder, 1)
    assert (found - expected[1]).norm() < 1e-3 * expected[1].norm()
    assert block_path(folder, 1).stat().st_size > 1.5 * block_path(folder, 0).stat().st_size
    before = bytes_of(folder)
    write_activations(source, windows, folder, SETTINGS)
    assert bytes_of(folder) == before


def test_a_model_that_overflows_is_named_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    tensors = tiny_tensors("x060", layers=3, width=64, dtype=torch.float32)
    tensors["blocks.0.ffn.value.weight"] *= 1e38 / tensors["blocks.0.ffn.value.weight"].abs().max()
    source = open_checkpoint(write_tensors(tmp_path / "huge.safetensors", tensors))
    with pytest.raises(ActivationError, match="input of block 1: windows 0 to 1 hold values that are not finite"):
        write_activations(source, made_up_windows(), tmp_path / "cache", SETTINGS)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["block-000.parquet"]


def test_a_nan_weight_is_the_checkpoints_fault(tmp_path: Path) -> None:
    tensors = tiny_tensors("x060", layers=2, width=64)
    tensors["blocks.0.att.key.weight"][3, 4] = float("nan")
    source = open_checkpoint(write_tensors(tmp_path / "nan.safetensors", tensors))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.att\.key\.weight"):
        write_activations(source, made_up_windows(), tmp_path / "cache", SETTINGS)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_estimate_is_near_the_size_on_disk(tmp_path: Path, version: str) -> None:
    source, windows = checkpoint(tmp_path, version), made_up_windows(8, 512)
    files = write_activations(source, windows, tmp_path / "cache", SETTINGS)
    size = sum(path.stat().st_size for path in files)
    assert size <= estimate_cache_bytes(source.spec, 8, 512) <= 1.02 * size
