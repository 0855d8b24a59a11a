"""Model files and folders made to harm: refused in one line, with nothing run, followed or waited for."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.errors import CheckpointError, RwkvqError
from tests.hostile import refusal, write_safetensors
from tests.tiny import tiny_tensors, write_tensors, write_tiny


def entry(*offsets: int, shape: tuple[int, ...] = (4,), dtype: str = "F16") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS: dict[str, tuple[object, bytes]] = {
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "out of range": ({"a": entry(0, 1 << 40, shape=(1 << 39,))}, bytes(8)),
    "negative": ({"a": entry(-8, 0)}, bytes(8)),
    "backwards": ({"a": entry(8, 0)}, bytes(8)),
    "gap": ({"a": entry(0, 8), "b": entry(16, 24)}, bytes(24)),
    "bytes left over": ({"a": entry(0, 8)}, bytes(9)),
    "shape and offsets differ": ({"a": entry(0, 8, shape=(5,))}, bytes(8)),
    "shape overflows": ({"a": entry(0, 8, shape=(1 << 62, 1 << 62))}, bytes(8)),
    "negative shape": ({"a": entry(0, 8, shape=(-4,))}, bytes(8)),
    "unknown dtype": ({"a": entry(0, 8, dtype="F17")}, bytes(8)),
    "no JSON": (b"{oops", b""),
    "not UTF-8": (b'{"\xff\xfe": 1}', b""),
    "deep": (b"[" * 100_000, b""),
    "no object": (b"[1, 2]", b""),
    "empty": (b"", b""),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, kind: str) -> None:
    assert "truncated or damaged" in refusal(write_safetensors(tmp_path / "model.safetensors", *HEADERS[kind]))


@pytest.mark.parametrize("length", [0, 9, 17 << 20, 1 << 40, (1 << 64) - 1])
def test_an_absurd_header_length_is_refused_unread(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    if length == 17 << 20:
        os.truncate(path, length + 8)  # a header as long as it says, and longer than any
        assert "at most" in refusal(path)
    else:
        assert "header reaches beyond" in refusal(path)


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "a/b", "a\\b", "..", "a\nb", "a\x1b[2J", "\u202ex", "\0", "x" * 300]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_tensor_name_cannot_lead_out_of_a_folder(tmp_path: Path, name: str, suffix: str) -> None:
    tensors = tiny_tensors("x070") | {name: torch.zeros(4)}
    message = refusal(write_tensors(tmp_path / f"model{suffix}", tensors))
    assert "a tensor is named" in message and message.isprintable()


def test_a_model_name_that_no_report_could_show_is_refused(tmp_path: Path) -> None:
    for name in (b"mod\xffel.pth", b"mod\nel.pth", b"mod\x1b[2Jel.pth"):
        path = write_tiny(tmp_path / "model.pth", "x070").rename(tmp_path / os.fsdecode(name))
        with pytest.raises(CheckpointError, match=r"characters that cannot be shown; rename it") as caught:
            open_checkpoint(path)
        assert str(caught.value).isprintable()


# ---------------------------------------------------------------------------------------------- links, pipes, devices

SHARD = "model.safetensors"


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A folder with one shard."""
    folder = tmp_path / "sound"
    write_tiny(folder / SHARD, "x070")
    return folder


def test_the_hugging_face_cache_is_read(tmp_path: Path, sound: Path) -> None:
    cache = tmp_path / "models--a--b"
    blob = cache / "blobs" / "0123abcd"
    blob.parent.mkdir(parents=True)
    shutil.move(sound / SHARD, blob)
    for depth in ("", "sub/folder"):
        snapshot = cache / "snapshots" / "rev" / depth
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / SHARD).symlink_to(os.path.relpath(blob, snapshot))
        assert open_checkpoint(snapshot).spec.layers == 2
        assert open_checkpoint(snapshot / SHARD).spec.layers == 2


def test_a_link_given_by_the_user_is_followed(tmp_path: Path, sound: Path) -> None:
    (tmp_path / "file.safetensors").symlink_to(sound / SHARD)
    (tmp_path / "folder").symlink_to(sound)
    (sound / "again.safetensors").symlink_to(SHARD)  # a link inside the folder
    assert open_checkpoint(tmp_path / "file.safetensors").spec.layers == 2
    (sound / "again.safetensors").unlink()
    assert open_checkpoint(tmp_path / "folder").spec.layers == 2


def outside(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "secret.safetensors")
    (folder / SHARD).symlink_to(folder.parent / "secret.safetensors")


def false_cache(folder: Path) -> None:
    """A folder of that layout whose `blobs` is itself a link."""
    outside(folder)
    snapshot = folder.parent / "models--a--b" / "snapshots" / "rev"
    snapshot.parent.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").symlink_to(folder.parent)
    folder.rename(snapshot)
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to("../../blobs/secret.safetensors")
    folder.symlink_to(snapshot)


def linked_index(folder: Path) -> None:
    (folder.parent / "index").write_text('{"weight_map": {}}')
    (folder / f"{SHARD}.index.json").symlink_to(folder.parent / "index")


def bind(path: Path) -> None:
    """A socket; its name is relative because names of sockets are short."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "link outside": (outside, "a link that leads out of its folder"),
    "link to a device": (lambda folder: (folder / "b.safetensors").symlink_to("/dev/zero"), "a link that leads out"),
    "link to nothing": (lambda folder: (folder / "b.safetensors").symlink_to("gone"), "missing"),
    "false cache": (false_cache, "a link that leads out of its folder"),
    "index outside": (linked_index, "a link that leads out of its folder"),
    "pipe": (lambda folder: os.mkfifo(folder / "b.safetensors"), "not a regular file"),
    "pipe as index": (lambda folder: os.mkfifo(folder / f"{SHARD}.index.json"), "not a regular file"),
    "folder as shard": (lambda folder: (folder / "b.safetensors").mkdir(), "not a regular file"),
    "socket": (lambda folder: bind(folder / "b.safetensors"), "not a regular file"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_a_folder_holds_in_place_of_files_is_refused(sound: Path, kind: str) -> None:
    make, words = ODD[kind]
    assert open_checkpoint(sound).spec.layers == 2
    make(sound)
    assert words in refusal(sound)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pipe_or_a_device_as_model_is_refused(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        assert "not a regular file" in refusal(tmp_path / f"{name}{suffix}")


def test_pipes_in_place_of_texts_and_tokenizers_are_refused(tmp_path: Path) -> None:
    from rwkvq.calibration.texts import read_texts
    from rwkvq.evaluation.lambada import read_examples
    from rwkvq.models.tokenizer import load_tokenizer
    from rwkvq.plan.plan import Plan
    from rwkvq.proxies import table

    readers: dict[str, Callable[[Path], object]] = {
        "a.txt": lambda path: read_texts(path.name, "text", path.parent),
        "a.jsonl": lambda path: read_texts(path.name, "text", path.parent),
        "a.parquet": lambda path: read_texts(path.name, "text", path.parent),
        "b.jsonl": read_examples,
        "tokenizer.json": load_tokenizer,
        "vocabulary.txt": load_tokenizer,
        "plan.json": Plan.read,
        "proxies.parquet": table.read,
    }
    for name, read in readers.items():
        os.mkfifo(tmp_path / name)
        with pytest.raises(RwkvqError, match="not a regular file") as caught:
            read(tmp_path / name)
        assert name in str(caught.value)
