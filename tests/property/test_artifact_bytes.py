"""Any change to any byte of an artifact is found; whatever is changed, the reader fails with ArtifactError only."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkvq.artifact.reader import open_artifact
from rwkvq.artifact.sums import write_sums
from rwkvq.artifact.verify import verify
from rwkvq.errors import ArtifactError
from tests.packed import codes_of, plan_of, tiny_source, write_packed

FUZZ = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1 << 64) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    source = tiny_source(folder, "x070", layers=1, width=64, vocab=64)
    plan = plan_of(source)
    return write_packed(folder / "artifact", source, plan, codes_of(plan))


def outcome(folder: Path) -> str | None:
    """The refusal, or None if the artifact is sound; any other exception fails the test."""
    try:
        verify(folder)
    except ArtifactError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return str(error)
    return None


def copied(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy", dirs_exist_ok=True))


@given(data=st.data())
@FUZZ
def test_any_flipped_bit_is_found(artifact: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = copied(artifact, tmp_path)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        open_artifact(folder)


@given(data=st.data())
@FUZZ
def test_damaged_headers_with_right_sums_never_crash(artifact: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = copied(artifact, tmp_path)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    write_sums(folder)
    outcome(folder)


def _paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in ((*here, key), *_paths(inner, (*here, key)))]


@given(data=st.data())
@FUZZ
def test_any_json_in_place_of_any_value_never_crashes(artifact: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = copied(artifact, tmp_path)
    path = folder / data.draw(st.sampled_from(["quantization.json", "config.json"]))
    values = json.loads(path.read_text())
    paths = _paths(values)
    *parents, last = paths[data.draw(st.integers(0, len(paths) - 1))]
    place = values
    for key in parents:
        place = place[key]
    place[last] = data.draw(JSON)
    path.write_text(json.dumps(values))
    write_sums(folder)
    outcome(folder)


@given(shape=st.lists(st.integers(0, 1 << 62), max_size=4), data=st.data())
@FUZZ
def test_any_claimed_shape_is_refused_or_true(
    artifact: Path, tmp_path: Path, shape: list[int], data: st.DataObject
) -> None:
    folder = copied(artifact, tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    key = data.draw(st.sampled_from(sorted(key for key in header if key != "__metadata__")))
    is_changed = header[key]["shape"] != shape
    header[key]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    write_sums(folder)
    assert (outcome(folder) is not None) == is_changed
