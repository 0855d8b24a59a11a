"""The golden artifacts: their bytes never change unnoticed, and docs/format.md alone is enough to decode them.

The decoder below follows docs/format.md and uses nothing of rwkvq, so it fails if format and document part ways.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rwkvq.artifact.reader import open_artifact
from rwkvq.artifact.verify import verify
from rwkvq.formats import FORMATS
from rwkvq.plan.bits import totals
from tests.golden.make_artifact import FOLDER, SHARD_BYTES, write_golden

VERSIONS = sorted(SHARD_BYTES)
DTYPES = {"U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32, "BF16": np.uint16}
Array = np.ndarray[Any, np.dtype[Any]]


def stored_tensors(folder: Path) -> dict[str, Array]:
    """Every stored tensor of an artifact by key; bfloat16 as float32."""
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"] if index.exists() else {"": "model.safetensors"}
    tensors: dict[str, Array] = {}
    for name in sorted(set(places.values())):
        data = (folder / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert (8 + length) % 64 == 0
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "rwkvq/1"}
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            flat = np.frombuffer(data[8 + length + begin : 8 + length + end], DTYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":
                flat = (flat.astype(np.uint32) << 16).view(np.float32)
            tensors[key] = flat.reshape(entry["shape"])
    return tensors


def bit_stream(packed: Array, bits: int, count: int) -> Array:
    """Code i is bits * i .. bits * (i + 1) - 1 of the stream; the lowest bit comes first."""
    number = int.from_bytes(packed.tobytes(), "little")
    return np.array([number >> (bits * code) & ((1 << bits) - 1) for code in range(count)], np.int64)


def decode_scalar(parts: dict[str, Array], layout: dict[str, Any]) -> Array:
    rows, columns, bits, group = (layout[key] for key in ("rows", "columns", "bits", "group_size"))
    codes = bit_stream(parts["codes"], bits, rows * columns).reshape(rows, columns // group, group)
    zero: Any = 2 ** (bits - 1)
    if not layout["symmetric"]:
        zero = bit_stream(parts["zero"], bits, rows * columns // group).reshape(rows, -1, 1)
    return ((codes - zero) * parts["scale"].astype(np.float32)[..., None]).reshape(rows, columns)


def decode_vector(parts: dict[str, Array], layout: dict[str, Any]) -> Array:
    rows, columns, dimension = (layout[key] for key in ("rows", "columns", "dimension"))
    bits = layout["entries"].bit_length() - 1
    codes = bit_stream(parts["codes"], bits, rows * columns // dimension).reshape(rows, -1)
    stripes = columns // layout["group_columns"]
    decoded = np.zeros((rows, columns), np.float32)
    for row in range(rows):
        for place, code in enumerate(codes[row]):
            stripe = place * dimension // layout["group_columns"]
            group = row // layout["group_rows"] * stripes + stripe
            entry = parts["codebook"][group].astype(np.float32)
            if layout["svd_rank"] is not None:
                scaled = entry * parts["scale"][stripe].astype(np.float32)
                vector = scaled @ parts["basis"].astype(np.float32)[:, code]
            elif layout["codebook_bits"] == 8:
                vector = entry[code] * np.float32(parts["scale"][group])
            else:
                vector = entry[code]
            decoded[row, place * dimension : (place + 1) * dimension] = vector
    return decoded


def decode_elementwise(parts: dict[str, Array], layout: dict[str, Any]) -> Array:
    bits = (layout["entries"] - 1).bit_length()
    codes = bit_stream(parts["codes"], bits, layout["size"])
    block = np.arange(layout["size"]) // layout["block"]
    return parts["codebook"][block, codes].astype(np.float32) * parts["scale"].astype(np.float32)[block]


def row_scales(parts: dict[str, Array], rows: int) -> Array:
    steps = bit_stream(parts["scale"], 6, rows).astype(np.float64)
    return (2.0 ** (-steps / 8) * parts["base"][0].astype(np.float64)).astype(np.float32)


def rate_offsets(parts: dict[str, Array], name: str, bits: int, count: int) -> list[int]:
    return [int(number) - (1 << bits - 1) for number in bit_stream(parts[name], bits, count)] if bits else [0] * count


def decode_trellis(parts: dict[str, Array], layout: dict[str, Any]) -> Array:
    rows, columns, state_bits, length = (layout[key] for key in ("rows", "columns", "state_bits", "length"))
    scales = row_scales(parts, rows)
    row_offsets = rate_offsets(parts, "row_offsets", layout["row_offset_bits"], rows)
    column_offsets = rate_offsets(parts, "column_offsets", layout["column_offset_bits"], columns)
    decoded = np.empty((rows, columns), np.float32)
    for sequence, codes in enumerate(parts["codes"]):
        begin = 0
        for column in range(columns):
            rate = layout["quarter_bits"] + column_offsets[column]
            stream = codes[begin : begin + rate * length // 32]
            begin += len(stream)
            bits = [int(byte) >> bit & 1 for byte in stream for bit in range(8)]
            total = 0
            for row in range(sequence * length, (sequence + 1) * length):
                total += rate + row_offsets[row]
                own = [bits[(total // 4 - state_bits + i) % len(bits)] for i in range(state_bits)]
                product = sum(bit << i for i, bit in enumerate(own)) * 0x83DCD12D % 2**32
                value = (sum(product >> shift & 255 for shift in (0, 8, 16, 24)) - 510) / 147.8
                decoded[row, column] = np.float32(value) * scales[row]
        assert begin == len(codes)
    return decoded


def decode_table(parts: dict[str, Array], layout: dict[str, Any]) -> Array:
    rows, columns = layout["rows"], layout["columns"]
    codes = bit_stream(parts["codes"], layout["bits"], rows * columns).reshape(rows, columns)
    selector = bit_stream(parts["selector"], 4, rows * columns // 16).reshape(rows, columns // 16)
    entries = parts["table"][selector.repeat(16, 1), codes].astype(np.float32) / np.float32(32)
    return entries * row_scales(parts, rows)[:, None]


def decode_scaled(parts: dict[str, Array], layout: dict[str, Any]) -> Array:
    return decode_scalar(parts, layout) / parts["column_scale"].astype(np.float32)


def decode_rotated(parts: dict[str, Array], layout: dict[str, Any]) -> Array:
    columns = layout["columns"]
    block = next(size for size in reversed(range(columns + 1)) if columns % size == 0 and size.bit_count() == 1)
    places = np.arange(block)
    signs = np.array([[(-1) ** int(i & j).bit_count() for j in places] for i in places], np.float32)
    turned = decode_scalar(parts, layout).reshape(-1, block) @ signs / np.float32(block**0.5)
    return turned.reshape(-1, columns) * (1 - 2 * bit_stream(parts["flips"], 1, columns)).astype(np.float32)


def decode_affine(parts: dict[str, Array], layout: dict[str, Any]) -> Array:
    rows, columns, group = (layout[key] for key in ("rows", "columns", "group_size"))
    codes = bit_stream(parts["codes"], layout["bits"], rows * columns).reshape(rows, columns // group, group)
    scale, zero = (parts[name].astype(np.float32)[..., None] for name in ("scale", "zero"))
    return ((codes.astype(np.float32) - zero) * scale).reshape(rows, columns)


def decode_residual(parts: dict[str, Array], layout: dict[str, Any]) -> Array:
    rows, columns, dimension = (layout[key] for key in ("rows", "columns", "dimension"))
    decoded = np.zeros((rows, columns), np.float32)
    for prefix, entries in (("", layout["entries"]), ("residual_", layout["residual_entries"])):
        bits = entries.bit_length() - 1
        codes = bit_stream(parts[f"{prefix}codes"], bits, rows // dimension * columns).reshape(-1, columns)
        for place, column in np.ndindex(codes.shape):
            vector = parts[f"{prefix}codebook"][codes[place, column]].astype(np.float32)
            decoded[place * dimension : (place + 1) * dimension, column] += vector
    return decoded


DECODERS = {
    "scalar": decode_scalar,
    "vector": decode_vector,
    "elementwise": decode_elementwise,
    "trellis": decode_trellis,
    "table": decode_table,
    "scaled": decode_scaled,
    "rotated": decode_rotated,
    "affine": decode_affine,
    "residual": decode_residual,
}


def decode_artifact(folder: Path) -> dict[str, Array]:
    """Every weight of an artifact, by the document alone."""
    tensors = stored_tensors(folder)
    weights = {}
    for row in json.loads((folder / "quantization.json").read_text())["tensors"]:
        name = row["name"]
        if row["format"] == "dense":
            weights[name] = tensors[name].astype(np.float32)
            continue
        parts = {key.split("::")[1]: part for key, part in tensors.items() if key.startswith(f"{name}::")}
        weights[name] = DECODERS[row["format"]](parts, row["layout"])
        assert row["stored_bits"] == 8 * sum(part.nbytes for part in parts.values())
    return weights


@pytest.mark.parametrize("version", VERSIONS)
def test_writing_again_gives_the_golden_bytes(version: str, tmp_path: Path) -> None:
    written = write_golden(tmp_path, version)  # type: ignore[arg-type]
    expected = {file.name: file.read_bytes() for file in (FOLDER / version).iterdir()}
    found = {file.name: file.read_bytes() for file in written.iterdir()}
    assert sorted(found) == sorted(expected)
    changed = [name for name in expected if found[name] != expected[name]]
    assert not changed, f"{changed} changed; if that is meant, run `python -m tests.golden.make_artifact`"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_document_decodes_the_golden_artifact(version: str) -> None:
    artifact = open_artifact(FOLDER / version)
    decoded = decode_artifact(FOLDER / version)
    assert list(decoded) == [planned.name for planned in artifact.plan.tensors]
    for name, expected in decoded.items():
        assert torch.equal(artifact.weight(name).float().reshape(expected.shape), torch.from_numpy(expected)), name


def test_the_golden_artifacts_use_every_format() -> None:
    plans = [open_artifact(FOLDER / version).plan for version in VERSIONS]
    assert {planned.layout.format for plan in plans for planned in plan.tensors} == {"dense", *DECODERS} == set(FORMATS)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_golden_artifact_is_sound(version: str) -> None:
    report = verify(FOLDER / version)
    assert report.unlisted == ()
    assert report.stored_bits == totals(open_artifact(FOLDER / version).plan).total_stored_bits


def test_the_golden_artifacts_are_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 200_000
