"""One cache file: exact layout, exact values, every damage found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from rwkvq.calibration.cache import BeyondFloat16Error, CacheKey, CacheReader, CacheShape, CacheWriter, Kind
from rwkvq.errors import ActivationError

KEY = CacheKey("model", "windows", "code")
SHAPE = CacheShape(windows=5, length=7, width=24, held_out=(1, 4), has_v_first=True)


def values(seed: int = 0) -> Tensor:
    x = torch.randn(SHAPE.windows, SHAPE.length, SHAPE.width, generator=torch.Generator().manual_seed(seed))
    return x.half().float()


def write(path: Path, x: Tensor, kind: Kind = "float16") -> Path:
    with CacheWriter(path, "input of block 3", KEY, SHAPE, kind) as writer:
        for part in x.split(2):
            writer.add(part)
    return path


def read(path: Path) -> Tensor:
    with CacheReader(path, "input of block 3") as reader:
        reader.expect(KEY)
        reader.check()
        return torch.cat([reader.read(0, 3), reader.read(3, 5)])


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_values_come_back_exactly(tmp_path: Path, kind: Kind) -> None:
    x = values()
    assert torch.equal(read(write(tmp_path / "a.parquet", x, kind)), x)


def test_rows_are_tokens_and_row_groups_are_windows(tmp_path: Path) -> None:
    x = values()
    path = write(tmp_path / "a.parquet", x)
    file = pq.ParquetFile(path)
    assert file.metadata.num_row_groups == SHAPE.windows
    table = file.read()
    assert [str(field.type) for field in table.schema] == [
        "int32",
        "int32",
        "fixed_size_binary[48]",
    ]
    assert table.column("window").to_pylist() == [window for window in range(5) for _ in range(7)]
    assert table.column("position").to_pylist() == list(range(7)) * 5
    stored = np.frombuffer(b"".join(table.column("x").to_pylist()), "<f2").reshape(35, 24)
    assert np.array_equal(stored.astype(np.float32), x.reshape(35, 24).numpy())
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata["model_sha256"] == "model"
    assert metadata["windows_sha256"] == "windows"
    assert metadata["code_version"] == "code"


def test_shape_and_held_out_are_in_the_file(tmp_path: Path) -> None:
    with CacheReader(write(tmp_path / "a.parquet", values()), "input of block 3") as reader:
        assert reader.shape == SHAPE
        assert reader.key == KEY


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1", values()), write(tmp_path / "2", values())
    assert first.read_bytes() == second.read_bytes()


def test_values_near_the_end_of_float16_ask_for_float32(tmp_path: Path) -> None:
    x = values()
    x[3, 2, 1] = 29_999.0
    write(tmp_path / "a.parquet", x)
    x[3, 2, 1] = -30_016.0
    with pytest.raises(BeyondFloat16Error) as caught:
        write(tmp_path / "b.parquet", x)
    assert caught.value.rows == "input of block 3"
    assert torch.equal(read(write(tmp_path / "c.parquet", x, "float32")), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    x = values()
    x[3, 2, 1] = value
    with pytest.raises(ActivationError, match="input of block 3: windows 2 to 3 hold values that are not finite"):
        write(tmp_path / "a.parquet", x)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (CacheKey("other", "windows", "code"), r"another model \(model_sha256 model, expected other\)"),
        (CacheKey("model", "other", "code"), "other windows"),
        (CacheKey("model", "windows", "other"), "another version of this program"),
    ],
)
def test_a_cache_of_something_else_says_of_what(tmp_path: Path, key: CacheKey, expected: str) -> None:
    path = write(tmp_path / "a.parquet", values())
    with (
        CacheReader(path, "input of block 3") as reader,
        pytest.raises(ActivationError, match=expected) as caught,
    ):
        reader.expect(key)
    assert str(path) in str(caught.value)
    assert "run the activations stage again" in str(caught.value)


def test_a_file_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", values())
    with pytest.raises(ActivationError, match="another part of the cache"):
        CacheReader(path, "input of block 4")


def test_a_missing_file_and_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ActivationError, match=r"a\.parquet: no such file"):
        CacheReader(tmp_path / "a.parquet", "v_first")
    path = write(tmp_path / "a.parquet", values())
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"format": b"rwkvq-activations/0"}), path)
    with pytest.raises(ActivationError, match="format rwkvq-activations/0"):
        CacheReader(path, "input of block 3")


def test_a_flipped_bit_in_the_values_is_found_wherever_it_is(tmp_path: Path) -> None:
    x = values()
    path = write(tmp_path / "a.parquet", x)
    whole = path.read_bytes()
    for window, position, channel in [(0, 0, 0), (2, 3, 5), (4, 6, 23)]:
        # the rows of a token are stored as they are in memory
        at = whole.index(x[window, position].half().numpy().tobytes()) + 2 * channel
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ActivationError, match="damaged") as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    assert torch.equal(read(path), x)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_found(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "a.parquet", values())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ActivationError, match="damaged"):
        read(path)


def test_windows_in_another_order_are_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", values())
    file = pq.ParquetFile(path)
    with pq.ParquetWriter(
        tmp_path / "b.parquet", file.schema_arrow, use_dictionary=False, compression="none"
    ) as writer:
        for window in (1, 0, 2, 3, 4):
            writer.write_table(file.read_row_group(window))
    with pytest.raises(ActivationError, match="number of window 0"):
        read(tmp_path / "b.parquet")
