"""Model files of torch.save made to harm: refused in one line before torch reads them, with nothing run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rwkvq.checkpoint import archives
from rwkvq.checkpoint.reader import open_checkpoint
from tests.hostile import (
    change_directory,
    change_end,
    change_end64,
    legacy_claim,
    memory_bombs,
    refusal,
    text,
    zip_with,
)
from tests.tiny import tiny_tensors, write_tensors

BIG = 1 << 40


def saved(path: Path) -> Path:
    torch.save(tiny_tensors("x070"), path)
    return path


def twice(archive: zipfile.ZipFile) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", b"}.")


def overlapping(path: Path) -> None:
    """Two entries of the directory with the same bytes of the file."""
    zip_with(path)
    content = path.read_bytes()
    first = content.rindex(b"PK\1\2", 0, content.rindex(b"data/0"))
    change_directory(path, 42, content[first + 42 : first + 46], "data/1")


ZIPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "compressed": (lambda path: zip_with(path, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "compressed otherwise": (lambda path: zip_with(path, compression=zipfile.ZIP_LZMA), "is compressed"),
    "entry twice": (lambda path: zip_with(path, more=twice), "there twice"),
    "entry twice but for case": (
        lambda path: zip_with(path, more=lambda archive: archive.writestr("archive/DATA.PKL", b"}.")),
        "there twice",
    ),
    "odd name": (
        lambda path: zip_with(path, more=lambda archive: archive.writestr("archive/a\nb", b"")),
        "oddly named",
    ),
    "large pickle": (lambda path: zip_with(path, pickled=b"N" * (5 << 20)), "its data.pkl takes"),
    "no pickle": (lambda path: zipfile.ZipFile(path, "w").writestr("a/b", b"x"), "no data.pkl"),
    "size beyond the file": (
        lambda path: (zip_with(path), change_directory(path, 20, b"\xf0\xff\xff\x7f" * 2)),
        "claims bytes",
    ),
    "size that differs": (lambda path: (zip_with(path), change_directory(path, 24, b"\xf0\xff\xff\x7f")), "compressed"),
    "place beyond the file": (
        lambda path: (zip_with(path), change_directory(path, 42, b"\xf0\xff\xff\x7f")),
        "not where",
    ),
    "overlapping": (overlapping, "claims bytes of another"),
    "encrypted": (lambda path: (zip_with(path), change_directory(path, 8, b"\1\0")), "encrypted"),
    "many entries": (lambda path: (zip_with(path), change_end(path, 4, 65_000)), "damaged"),
    "many entries, zip64": (lambda path: change_end64(path, 32, BIG), "more than any model"),
    "large directory, zip64": (lambda path: change_end64(path, 40, BIG), "more than any model"),
    "other place, zip64": (lambda path: change_end64(path, 48, 8), "places and sizes do not fit"),
    "other size of the record, zip64": (lambda path: change_end64(path, 4, BIG), "do not fit"),
    "several disks": (lambda path: (zip_with(path), change_end(path, 1, 3)), "do not fit"),
    "something behind": (lambda path: saved(path).open("ab").write(b"PK\5\6"), "directory at its end is missing"),
    "something in front": (lambda path: path.write_bytes(b"PK" + saved(path).read_bytes()), "do not fit"),
}


@pytest.mark.parametrize("kind", ZIPS)
def test_a_zip_file_that_lies_is_refused(tmp_path: Path, kind: str) -> None:
    make, words = ZIPS[kind]
    path = tmp_path / "model.pth"
    make(path)
    assert words in refusal(path)


def test_absurdly_many_entries_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "model.pth")
    monkeypatch.setattr(archives, "MAX_ENTRIES", 10)
    monkeypatch.setattr(archives.zipfile, "ZipFile", lambda file: pytest.fail("the directory was read"))
    assert "entries" in refusal(path)


def test_a_plain_zip_file_of_other_origin_is_read(tmp_path: Path) -> None:
    """What the tests above spoil is sound before."""
    assert open_checkpoint(zip_with(tmp_path / "model.pth")).spec.layers == 2
    torch.save(tiny_tensors("x070"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert open_checkpoint(tmp_path / "old.pth").spec.layers == 2


def test_parameters_and_ordered_dictionaries_are_read(tmp_path: Path) -> None:
    module = torch.nn.Module()
    tensors = tiny_tensors("x070")
    state = module.state_dict()  # an OrderedDict with _metadata
    state.update({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()})
    state["head.weight"] = torch.nn.Parameter(tensors["head.weight"].float())
    torch.save(state, tmp_path / "model.pth")
    assert torch.equal(open_checkpoint(tmp_path / "model.pth").tensor("emb.weight"), tensors["emb.weight"])


@pytest.mark.parametrize("kind", memory_bombs())
@pytest.mark.parametrize("place", ["zip", "legacy"])
def test_a_pickle_that_would_fill_the_memory_is_refused(tmp_path: Path, kind: str, place: str) -> None:
    path, program = tmp_path / "model.pth", memory_bombs()[kind]
    if place == "zip":
        zip_with(path, pickled=program or b"\0")
    else:
        path.write_bytes(saved_legacy_start() + program)
    message = refusal(path)
    assert "nothing was run" in message or "truncated or damaged" in message
    assert "torch" not in message  # refused before torch saw it


def saved_legacy_start() -> bytes:
    parts = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in parts)


FOREIGN = ("os system", "builtins eval", "torch.hub load", "numpy.core.multiarray _reconstruct", "torch.jit load")


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_code_is_named_and_not_run(tmp_path: Path, name: str) -> None:
    program = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n" + text("x") + b"\x85R."
    message = refusal(zip_with(tmp_path / "model.pth", pickled=program))
    assert name.replace(" ", ".") in message and "nothing was run" in message


def test_a_claim_beyond_a_legacy_file_is_refused(tmp_path: Path) -> None:
    assert "truncated or damaged" in refusal(legacy_claim(tmp_path / "model.pth", 1 << 60))


@pytest.mark.parametrize("shape", [(1 << 57, 128), (1 << 40, 128), (1 << 62, 1 << 62)])
def test_absurd_shapes_of_stride_zero_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """2**57 rows of 128 make 2**64 elements, which wraps to none in 64 bits."""
    tensors = tiny_tensors("x070")
    tensors["emb.weight"] = torch.zeros(1, dtype=torch.bfloat16).as_strided((1, 1), (0, 0))
    path = write_tensors(tmp_path / "model.pth", tensors)
    with zipfile.ZipFile(path) as archive:
        program = archive.read("model/data.pkl" if "model/data.pkl" in archive.namelist() else "archive/data.pkl")
    number = [b"\x8a\x09" + side.to_bytes(9, "little") for side in shape]
    spoiled = program.replace(b"K\x01K\x01\x86", b"".join(number) + b"\x86", 1)
    assert spoiled != program
    message = refusal(zip_with(path, pickled=spoiled))
    assert "emb.weight" in message or "truncated or damaged" in message
