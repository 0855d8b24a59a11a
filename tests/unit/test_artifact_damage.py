"""Damaged and hostile artifacts: one line that names the file and says what to do, before anything is allocated."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rwkvq.artifact.reader import open_artifact
from rwkvq.artifact.sums import write_sums
from rwkvq.artifact.verify import verify
from rwkvq.errors import ArtifactError
from tests.packed import codes_of, plan_of, tiny_source, write_packed

INDEX = "model.safetensors.index.json"
Values = dict[str, Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    source = tiny_source(folder, "x060", layers=1, width=64, vocab=64)
    plan = plan_of(source)
    write_packed(folder / "single", source, plan, codes_of(plan))
    write_packed(folder / "shards", source, plan, codes_of(plan), shard_bytes=20_000)
    return folder


@pytest.fixture
def single(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound / "single", tmp_path / "single"))


@pytest.fixture
def shards(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound / "shards", tmp_path / "shards"))


def refusal(folder: Path, check: Callable[[Path], object] = open_artifact) -> str:
    with pytest.raises(ArtifactError) as caught:
        check(folder)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(folder)), message
    assert any(remedy in message for remedy in ("again", "use the rwkvq that wrote it", "give the folder")), message
    return message


def edit(path: Path, change: Callable[[Values], object]) -> None:
    """Change a JSON file and make the checksums right again, as someone with intent would."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    write_sums(path.parent)


def edit_header(path: Path, change: Callable[[Values], object]) -> None:
    """Change the header of a safetensors file; offsets stay valid since they count from the end of the header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    write_sums(path.parent)


@pytest.mark.parametrize(
    "name", ["config.json", "quantization.json", "provenance.json", "model.safetensors", "SHA256SUMS"]
)
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_every_flipped_byte_is_found(single: Path, name: str, place: float) -> None:
    data = bytearray((single / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (single / name).write_bytes(data)
    assert name in refusal(single)


@pytest.mark.parametrize(
    "name", ["config.json", "quantization.json", "provenance.json", "model.safetensors", "SHA256SUMS"]
)
def test_missing_file_is_named(single: Path, name: str) -> None:
    (single / name).unlink()
    assert name in refusal(single)


def test_missing_shard_is_named(shards: Path) -> None:
    name = sorted(file.name for file in shards.glob("model-*.safetensors"))[1]
    (shards / name).unlink()
    assert f"{shards / name}: missing" in refusal(shards)


@pytest.mark.parametrize("name", ["quantization.json", "model.safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 100, -2])
def test_truncated_file_is_named_even_if_its_sum_was_renewed(single: Path, name: str, kept: int) -> None:
    data = (single / name).read_bytes()
    (single / name).write_bytes(data[:kept])
    assert name in refusal(single)
    write_sums(single)
    assert name in refusal(single)


def test_no_folder_and_other_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nothing")
    assert "SHA256SUMS: missing" in refusal(tmp_path)


def test_checksums_of_weight_files_can_be_left_out(single: Path) -> None:
    data = bytearray((single / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (single / "model.safetensors").write_bytes(data)
    assert open_artifact(single, checksums=False).names()
    assert "model.safetensors: damaged" in refusal(single)
    assert "model.safetensors: damaged" in refusal(single, verify)


def test_other_format_versions_are_refused_by_name(single: Path) -> None:
    edit_header(single / "model.safetensors", lambda header: header["__metadata__"].update(format="rwkvq/2"))
    assert "model.safetensors: format is 'rwkvq/2'" in refusal(single)
    edit(single / "quantization.json", lambda values: values.update(format="rwkvq/9"))
    assert "quantization.json: format is 'rwkvq/9'" in refusal(single)


HUGE = (1 << 31) - 1


def _first(values: Values, form: str, without: str = "") -> Values:
    return next(row for row in values["tensors"] if row["format"] == form and row["class"] != without)


def _huge_scalar(values: Values) -> None:
    row = _first(values, "scalar", "elementwise")
    row["layout"] |= {"rows": HUGE, "columns": HUGE, "group_size": HUGE}
    row["tensor_shape"] = [HUGE, HUGE]
    row.pop("stored_bits")


def _huge_layout_only(values: Values) -> None:
    row = _first(values, "scalar", "elementwise")
    row["layout"] |= {"rows": HUGE, "columns": HUGE, "group_size": HUGE}
    row.pop("stored_bits")


def _huge_dense(values: Values) -> None:
    row = next(row for row in values["tensors"] if row["name"] == "emb.weight")
    row["layout"]["shape"] = row["tensor_shape"] = [HUGE, HUGE]
    row.pop("stored_bits")


def _huge_model(values: Values) -> None:
    """A consistent lie: description and rows agree on a vocabulary that the file does not hold."""
    values["spec"]["vocab"] = HUGE
    for row in values["tensors"]:
        if row["name"] in ("emb.weight", "head.weight"):
            row["layout"]["shape"] = row["tensor_shape"] = [HUGE, values["spec"]["width"]]
            row.pop("stored_bits")


def _huge_codebook(values: Values) -> None:
    row = _first(values, "vector")
    row["layout"]["entries"] = 1 << 30
    row.pop("stored_bits")


def _many_layers(values: Values) -> None:
    values["spec"]["layers"] = 10**7


@pytest.mark.parametrize(
    "lie", [_huge_scalar, _huge_layout_only, _huge_dense, _huge_model, _huge_codebook, _many_layers]
)
def test_absurd_shapes_are_refused_before_allocation(single: Path, lie: Callable[[Values], None]) -> None:
    edit(single / "quantization.json", lie)
    config = json.loads((single / "quantization.json").read_text())["spec"]
    edit(single / "config.json", lambda values: values.update(config))
    assert "quantization.json" in refusal(single) or "model.safetensors" in refusal(single)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda values: values["tensors"].pop(), "1 weights are missing"),
        (lambda values: values["tensors"].append(values["tensors"][0]), "emb.weight: planned 2 times"),
        (lambda values: values["tensors"][3].pop("error"), "not of the expected form"),
        (lambda values: values.pop("plan_format"), "not of the expected form"),
        (lambda values: values.update(tensors=3), "not of the expected form"),
        (lambda values: _first(values, "scalar").update(stored_bits=5), "stored_bits is 5"),
        (lambda values: _first(values, "scalar").update(format="hologram"), "hologram"),
    ],
)
def test_wrong_rows_are_refused(single: Path, change: Callable[[Values], object], expected: str) -> None:
    edit(single / "quantization.json", change)
    message = refusal(single)
    assert "quantization.json" in message and expected in message, message


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", "[" * 100_000, '{"format": NaN}', "\x00", '{"format": "rwkvq/1"}']
)
@pytest.mark.parametrize("name", ["config.json", "quantization.json"])
def test_other_text_is_refused(single: Path, name: str, text: str) -> None:
    (single / name).write_text(text)
    write_sums(single)
    assert name in refusal(single)


def test_config_of_another_model_is_refused(single: Path) -> None:
    edit(single / "config.json", lambda values: values.update(vocab=values["vocab"] + 1))
    assert "config.json: describes another model" in refusal(single)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda header: header.update({"extra": header.pop("ln_out.bias")}), "ln_out.bias is missing"),
        (lambda header: header["ln_out.bias"].update(dtype="F16"), "expected torch.bfloat16"),
        (lambda header: header["ln_out.bias"].update(dtype="I16"), "is None"),
        (lambda header: header["ln_out.bias"].update(shape=[8, 8]), r"[8, 8], expected torch.bfloat16 [64]"),
        (lambda header: header["ln_out.bias"].update(shape=[HUGE]), "truncated or damaged"),
        (lambda header: header["ln_out.bias"].update(data_offsets=[0, 1 << 60]), "truncated or damaged"),
    ],
)
def test_headers_that_do_not_fit_are_refused(single: Path, change: Callable[[Values], object], expected: str) -> None:
    edit_header(single / "model.safetensors", change)
    assert expected in refusal(single)


def test_tensor_that_no_row_names_is_refused(single: Path) -> None:
    def add(header: Values) -> None:
        header["extra"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}

    edit_header(single / "model.safetensors", add)
    assert "extra is not listed in quantization.json" in refusal(single)


@pytest.mark.parametrize(
    "name",
    ["../single/model.safetensors", "/etc/passwd", "a/../model.safetensors", "model.pth", "", 3, None, "..", "C:\\m"],
)
def test_index_cannot_lead_out_of_the_folder(shards: Path, name: object) -> None:
    edit(shards / INDEX, lambda values: values["weight_map"].update({"emb.weight": name}))
    message = refusal(shards)
    assert f"{INDEX}: emb.weight is in {name!r}, expected a shard of this folder" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda values: values["weight_map"].update(ghost="model-00001-of-00002.safetensors"), "missing"),
        (lambda values: values["weight_map"].update({"emb.weight": values["weight_map"]["ln_out.bias"]}), "emb.weight"),
        (lambda values: values["weight_map"].pop("ln_out.bias"), "holds ln_out.bias"),
        (lambda values: values.update(weight_map={}), "no weight_map"),
        (lambda values: values.update(weight_map=[1]), "no weight_map"),
    ],
)
def test_index_must_agree_with_the_shards(shards: Path, change: Callable[[Values], object], expected: str) -> None:
    edit(shards / INDEX, change)
    assert expected in refusal(shards)


def test_both_a_single_file_and_an_index_are_refused(shards: Path) -> None:
    shutil.copy(next(shards.glob("model-*")), shards / "model.safetensors")
    write_sums(shards)
    assert "holds both" in refusal(shards)


def test_weight_file_must_be_listed(shards: Path) -> None:
    lines = (shards / "SHA256SUMS").read_text().splitlines(keepends=True)
    (shards / "SHA256SUMS").write_text("".join(line for line in lines if "model-00001" not in line))
    assert "not listed in SHA256SUMS" in refusal(shards)


@pytest.mark.parametrize("line", ["x", "ab  config.json", f"{'0' * 64}  ../config.json", f"{'0' * 64}  config.json"])
def test_malformed_sums_are_refused(single: Path, line: str) -> None:
    with (single / "SHA256SUMS").open("a") as file:
        file.write(f"{line}\n")
    assert "SHA256SUMS: line" in refusal(single)


def test_values_that_a_format_excludes_are_named(single: Path) -> None:
    artifact = open_artifact(single)
    name = next(item.name for item in artifact.plan.tensors if item.method == "gptq")
    path = single / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8 : 8 + length])[f"{name}::scale"]["data_offsets"]
    data[8 + length + begin : 8 + length + end] = b"\x00\x7e" * ((end - begin) // 2)  # float16 NaN
    path.write_bytes(data)
    write_sums(single)
    assert open_artifact(single).names()
    message = refusal(single, verify)
    assert f"model.safetensors: {name}: part 'scale'" in message


def test_verify_reports_what_nothing_lists(single: Path) -> None:
    assert verify(single).unlisted == ()
    (single / "README.md").write_text("hello")
    report = verify(single)
    assert report.unlisted == ("README.md",) and "quantization.json" in report.files


def test_unknown_names_are_refused(single: Path) -> None:
    artifact = open_artifact(single)
    for call in (artifact.tensor, artifact.shape, artifact.dtype, artifact.weight):
        with pytest.raises(ArtifactError, match=r"no (tensor|weight) blocks\.7\.att\.key\.weight"):
            call("blocks.7.att.key.weight")
