"""Bad checkpoints: each gives one line that says where, what, and what to do; nothing in a file is ever run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.errors import CheckpointError
from tests.tiny import tiny_tensors, write_tensors, write_tiny

KEY = "blocks.1.att.key.weight"


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 1500
    return message


def _refusal_of(tmp_path: Path, tensors: dict[str, Tensor], suffix: str = ".pth") -> str:
    return _refusal(write_tensors(tmp_path / f"model{suffix}", tensors))


class _Payload:
    """Would create a folder if its pickle were run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    path = write_tiny(tmp_path / f"model{suffix}", "x070")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "truncated or damaged" in _refusal(path)


def test_truncated_legacy_pth(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(tiny_tensors("x070"), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "truncated or damaged" in _refusal(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_garbage(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(bytes(range(256)) * 8)
    assert "truncated or damaged" in _refusal(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_pickle_payload_is_not_run(tmp_path: Path, kind: str) -> None:
    target, path = tmp_path / "made-by-payload", tmp_path / "model.pth"
    values = {**tiny_tensors("x070"), "payload": _Payload(target)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(_Payload(target)))
    else:
        torch.save(values, path, _use_new_zipfile_serialization=kind == "zip")
    message = _refusal(path)
    assert "nothing was run" in message and ("mkdir" in message or kind == "plain")
    assert not target.exists()
    pickle.loads(pickle.dumps(_Payload(target)))  # the payload is a working one
    assert target.exists()


def test_wrong_shape_names_only_the_wrong_tensor(tmp_path: Path) -> None:
    tensors = tiny_tensors("x070")
    tensors[KEY] = tensors[KEY][:, :64].clone()
    message = _refusal_of(tmp_path, tensors)
    assert f"{KEY} is [128, 64], expected [128, 128]" in message and message.count(" is [") == 1


def test_transposed_low_rank_factor_is_a_wrong_shape(tmp_path: Path) -> None:
    tensors = tiny_tensors("x060")
    name = "blocks.0.att.time_maa_w1"
    tensors[name] = tensors[name].T.contiguous()
    assert f"{name} is [80, 128], expected [128, 80]" in _refusal_of(tmp_path, tensors)


def test_missing_unknown_wrong_dtype_are_all_in_one_message(tmp_path: Path) -> None:
    tensors = tiny_tensors("x060")
    del tensors[KEY]
    tensors["blocks.0.att.surprise"] = torch.zeros(3)
    tensors["ln_out.weight"] = torch.zeros(128, dtype=torch.int32)
    message = _refusal_of(tmp_path, tensors, ".safetensors")
    assert f"{KEY} is missing" in message
    assert "'blocks.0.att.surprise' is unknown" in message
    assert "ln_out.weight is I32, expected float16, bfloat16 or float32" in message


def test_long_lists_are_counted(tmp_path: Path) -> None:
    tensors = tiny_tensors("x070") | {f"extra.{number}": torch.zeros(1) for number in range(50)}
    assert "; and 42 more" in _refusal_of(tmp_path, tensors)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite_names_its_tensor(tmp_path: Path, suffix: str, value: float) -> None:
    tensors = tiny_tensors("x070")
    tensors[KEY][3, 5] = value
    checkpoint = open_checkpoint(write_tensors(tmp_path / f"model{suffix}", tensors))
    with pytest.raises(CheckpointError, match=rf"model{suffix}: {KEY} holds NaN or infinite"):
        checkpoint.tensor(KEY)
    checkpoint.tensor("emb.weight")


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("blocks.0.att.gate_w1", "x060a"),
        ("blocks.0.att.time_maa_rkvw_w1", "x060b or x060c"),
        ("blocks.0.att.time_state", "state-tuned"),
        ("blocks.0.ffn.s_emb.weight", "rwkv7a"),
        ("blocks.0.qkv.qq.weight", "rwkv7b"),
        ("model.layers.0.attn.r_proj.weight", "flash-linear-attention naming"),
        ("rwkv.blocks.0.attention.key.weight", "Hugging Face rwkv6 naming"),
        ("rwkv.embeddings.weight", "Hugging Face rwkv6 naming"),
        ("model.blocks.0.att.w1.weight", "LoRA factors as modules"),
        (f"{KEY}::codes", "packed rwkvq artifact"),
    ],
)
def test_variant_is_refused_by_name(tmp_path: Path, name: str, meaning: str) -> None:
    message = _refusal_of(tmp_path, tiny_tensors("x060") | {name: torch.zeros(4)})
    assert meaning in message and "not supported" in message


@pytest.mark.parametrize(
    ("others", "meaning"),
    [
        (["att.time_first"], "RWKV-4,"),
        (["att.time_first", "att.ln_x.weight"], "RWKV-5.0 or 5.1"),
        (["att.time_faaaa", "att.ln_x.weight", "att.gate.weight"], r"RWKV-5.2 (x052)"),
    ],
)
def test_old_version_is_refused_by_name(tmp_path: Path, others: list[str], meaning: str) -> None:
    names = ["att.time_mix_k", "att.time_decay", *others]
    tensors = {f"blocks.0.{name}": torch.zeros(4) for name in names}
    assert meaning in _refusal_of(tmp_path, tensors)


def test_something_else_entirely(tmp_path: Path) -> None:
    assert "not RWKV-6 or RWKV-7" in _refusal_of(tmp_path, {"transformer.h.0.weight": torch.zeros(4)})
    assert "expected tensors by name" in _refusal(_saved(tmp_path, [torch.zeros(2)]))
    assert "is a dict, expected a tensor" in _refusal(_saved(tmp_path, {"model": tiny_tensors("x070")}))


def _saved(tmp_path: Path, value: object) -> Path:
    torch.save(value, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def test_both_names_of_one_tensor(tmp_path: Path) -> None:
    tensors = tiny_tensors("x070")
    assert "holds both" in _refusal_of(tmp_path, tensors | {"model.emb.weight": tensors["emb.weight"]})


def test_tensor_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    tensors = tiny_tensors("x070")
    tensors["emb.weight"] = torch.zeros(1, dtype=torch.bfloat16).expand(1 << 40, 128)
    assert "more than the file holds" in _refusal_of(tmp_path, tensors)


def test_sparse_and_empty_tensors_are_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors("x070")
    assert "sparse or has no data" in _refusal_of(tmp_path, tensors | {KEY: torch.zeros(128, 128, device="meta")})
    assert "cannot be read" in _refusal_of(tmp_path, tensors | {"emb.weight": torch.zeros(0, 128)})


def test_path_that_is_no_model(tmp_path: Path) -> None:
    assert "no such file" in _refusal(tmp_path / "absent.pth")
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "unknown kind of file" in _refusal(tmp_path / "model.bin")
    (tmp_path / "empty").mkdir()
    assert "no .safetensors files" in _refusal(tmp_path / "empty")


def _sharded(folder: Path) -> dict[str, str]:
    """Write a model as two shards and their index; returns the weight map."""
    tensors = tiny_tensors("x070")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: files[number % 2] for number, name in enumerate(tensors)}
    for file in files:
        write_tensors(folder / file, {name: tensors[name] for name, place in weight_map.items() if place == file})
    _write_index(folder, weight_map)
    return weight_map


def _write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("with_index", [True, False])
def test_missing_shard_is_named(tmp_path: Path, with_index: bool) -> None:
    _sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    if not with_index:
        (tmp_path / "model.safetensors.index.json").unlink()
    message = _refusal(tmp_path)
    assert "model-00002-of-00002.safetensors: this shard is missing" in message


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "c:m.safetensors", "model.pth", 7]
)
def test_index_may_name_only_files_of_its_folder(tmp_path: Path, place: object) -> None:
    weight_map = _sharded(tmp_path / "folder")
    write_tiny(tmp_path / "model.safetensors", "x070")
    _write_index(tmp_path / "folder", weight_map | {KEY: place})
    assert f"{KEY} is placed in {place!r}" in _refusal(tmp_path / "folder")


def test_index_must_agree_with_the_shards(tmp_path: Path) -> None:
    weight_map = _sharded(tmp_path)
    _write_index(tmp_path, weight_map | {"blocks.9.absent": "model-00001-of-00002.safetensors"})
    assert "blocks.9.absent is missing although the index lists it" in _refusal(tmp_path)
    _write_index(tmp_path, {name: place for name, place in weight_map.items() if name != KEY})
    assert f"holds {KEY}, which the index does not place there" in _refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    _sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json:" in _refusal(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    for file in ("a.safetensors", "b.safetensors"):
        write_tiny(tmp_path / file, "x070")
    assert "another shard holds too" in _refusal(tmp_path)
