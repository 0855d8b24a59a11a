"""Writing and reading artifacts: what is read is what the codes stand for, and equal work gives equal bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rwkvq.artifact.reader import open_artifact
from rwkvq.artifact.verify import verify
from rwkvq.artifact.writer import software_versions, write_artifact
from rwkvq.checkpoint.names import extract, weights_of
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.errors import OutputError, PlanError, QuantizationError, TokenizerError
from rwkvq.formats import FORMATS, Codes, pack_codes
from rwkvq.plan.bits import totals
from rwkvq.plan.plan import Plan
from tests.packed import PROVENANCE, codes_of, errors_of, plan_of, tiny_source, write_packed

Packed = tuple[Checkpoint, Plan, dict[str, Codes], Path]


@pytest.fixture(scope="module", params=["x060", "x070"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny_source(folder, request.param)
    plan = plan_of(source)
    codes = codes_of(plan)
    return source, plan, codes, write_packed(folder / "artifact", source, plan, codes)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_format_is_used(packed: Packed) -> None:
    assert {planned.layout.format for planned in packed[1].tensors} == set(FORMATS)


def test_weights_are_the_decoded_codes_or_the_kept_values(packed: Packed) -> None:
    source, plan, codes, out = packed
    artifact = open_artifact(out)
    weights = {weight.name: weight for weight in weights_of(source.spec, {n: source.shape(n) for n in source.names()})}
    for planned in plan.tensors:
        found = artifact.weight(planned.name)
        if planned.method == "keep":
            expected = extract(source.tensor(planned.tensor), weights[planned.name]).to(found.dtype)
        else:
            code = codes[planned.name]
            expected = FORMATS[code.layout.format].decode(code)
        assert found.dtype == expected.dtype and torch.equal(found, expected), planned.name


def test_tensors_have_checkpoint_names_shapes_and_orientation(packed: Packed) -> None:
    source, plan, _, out = packed
    artifact = open_artifact(out)
    assert artifact.names() == source.names() and artifact.spec == source.spec
    rows = {planned.name: planned for planned in plan.tensors}
    for name in source.names():
        tensor = artifact.tensor(name)
        assert tuple(tensor.shape) == artifact.shape(name) == source.shape(name)
        assert tensor.dtype == artifact.dtype(name) and tensor.is_contiguous()
        if name in rows and rows[name].transposed:
            assert torch.equal(tensor, artifact.weight(name).T)
        elif name in rows and rows[name].layout.format == "dense" and rows[name].weight_class == "keep":
            assert torch.equal(tensor, source.tensor(name)) and tensor.dtype == source.dtype(name)


def test_slices_of_time_maa_w2_are_put_together(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "x060", layers=1)
    plan = plan_of(source)
    artifact = open_artifact(write_packed(tmp_path / "out", source, plan, codes_of(plan)))
    whole = artifact.tensor("blocks.0.att.time_maa_w2")
    for index, path in enumerate("wkvrg"):
        assert torch.equal(whole[index], artifact.weight(f"blocks.0.att.time_maa_w2.{path}").T)


def test_stored_bytes_are_what_the_plan_said(packed: Packed) -> None:
    _, plan, _, out = packed
    stored = safetensors.torch.load_file(out / "model.safetensors")
    for planned in plan.tensors:
        parts = [part for key, part in stored.items() if key == planned.name or key.startswith(f"{planned.name}::")]
        assert 8 * sum(part.numel() * part.element_size() for part in parts) == planned.stored_bits, planned.name
    report = verify(out)
    assert report.stored_bits == totals(plan).total_stored_bits
    assert report.weights == totals(plan).weights and report.tensors == len(open_artifact(out).names())
    header = int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little") + 8
    assert report.file_bytes == (out / "model.safetensors").stat().st_size == header + report.stored_bits // 8


def test_equal_work_gives_equal_bytes_in_shards_or_not(packed: Packed, tmp_path: Path) -> None:
    source, plan, codes, out = packed
    assert contents(write_packed(tmp_path / "again", source, plan, codes)) == contents(out)
    shards = [write_packed(tmp_path / name, source, plan, codes, shard_bytes=40_000) for name in ("a", "b")]
    assert contents(shards[0]) == contents(shards[1])


def test_shards_hold_the_same_tensors(packed: Packed, tmp_path: Path) -> None:
    source, plan, codes, out = packed
    sharded = open_artifact(write_packed(tmp_path / "out", source, plan, codes, shard_bytes=40_000))
    whole = open_artifact(out)
    assert len(sharded.weight_files) > 2 and whole.weight_files == ["model.safetensors"]
    assert all((sharded.path / name).stat().st_size < 100_000 for name in sharded.weight_files)
    assert all(torch.equal(sharded.tensor(name), whole.tensor(name)) for name in whole.names())
    index = json.loads((sharded.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] * 8 == totals(plan).total_stored_bits
    assert verify(sharded.path).stored_bits == totals(plan).total_stored_bits


def test_sums_are_those_of_the_sha256sum_program(packed: Packed) -> None:
    out = packed[3]
    lines = [line.split("  ") for line in (out / "SHA256SUMS").read_text().splitlines()]
    assert {name: digest for digest, name in lines} == {
        name: hashlib.sha256(data).hexdigest() for name, data in contents(out).items() if name != "SHA256SUMS"
    }


def test_quantization_json_holds_plan_and_errors(packed: Packed) -> None:
    _, plan, _, out = packed
    artifact = open_artifact(out)
    assert artifact.plan == plan and artifact.errors == errors_of(plan)
    rows = {row["name"]: row for row in json.loads((out / "quantization.json").read_text())["tensors"]}
    assert rows["emb.weight"]["error"] is None
    planned = next(item for item in plan.tensors if item.method == "gptq")
    row = rows[planned.name]
    assert row["stored_bits"] == planned.stored_bits and row["reason"] == "test" and row["proxies"]["p_c"] == 1.0
    assert row["error"] == {"weight_error": 0.03, "output_error": None}


def test_config_describes_the_model(packed: Packed) -> None:
    source, _, _, out = packed
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "rwkvq" and config["version"] == source.spec.version
    assert config["hidden_size"] == config["width"] == source.spec.width
    assert config["quantization_config"]["format"] == "rwkvq/1"


def test_identity_follows_the_weights_and_not_the_folder(packed: Packed, tmp_path: Path) -> None:
    source, plan, codes, out = packed
    again = write_packed(tmp_path / "again", source, plan, codes, provenance={"other": 1})
    other = write_packed(tmp_path / "other", source, plan, codes_of(plan, seed=1))
    assert open_artifact(again).identity() == open_artifact(out).identity() != open_artifact(other).identity()
    assert open_artifact(again).provenance() == {"other": 1}


def test_artifact_crosses_process_borders(packed: Packed) -> None:
    artifact = open_artifact(packed[3])
    copy = pickle.loads(pickle.dumps(artifact))
    assert torch.equal(copy.tensor("blocks.0.att.key.weight"), artifact.tensor("blocks.0.att.key.weight"))


def test_progress_counts_every_weight(packed: Packed, tmp_path: Path) -> None:
    source, plan, codes, _ = packed
    seen: list[tuple[str, int, int]] = []
    write_packed(tmp_path / "out", source, plan, codes, on_tensor=lambda *event: seen.append(event))
    total = len(plan.tensors)
    assert [event[1:] for event in seen] == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("suffix", [".json", ".txt"])
def test_tokenizer_is_copied(tmp_path: Path, suffix: str) -> None:
    source = tiny_source(tmp_path, "x070", layers=1)
    plan = plan_of(source)
    (tmp_path / f"vocabulary{suffix}").write_text("any")
    out = write_packed(tmp_path / "out", source, plan, codes_of(plan), tokenizer=tmp_path / f"vocabulary{suffix}")
    tokenizer = open_artifact(out).tokenizer
    assert tokenizer == out / f"tokenizer{suffix}" and tokenizer.read_text() == "any"


@pytest.mark.parametrize("name", ["missing.json", "vocabulary.model"])
def test_unusable_tokenizer_leaves_nothing(packed: Packed, tmp_path: Path, name: str) -> None:
    source, plan, codes, _ = packed
    with pytest.raises(TokenizerError, match=name):
        write_packed(tmp_path / "out", source, plan, codes, tokenizer=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_replaced_only_with_overwrite(packed: Packed, tmp_path: Path) -> None:
    source, plan, codes, _ = packed
    out = write_packed(tmp_path / "out", source, plan, codes)
    with pytest.raises(OutputError, match="--overwrite"):
        write_packed(out, source, plan, codes)
    write_packed(out, source, plan, codes_of(plan, seed=2), overwrite=True)
    assert open_artifact(out).identity() != open_artifact(packed[3]).identity()


def test_overwrite_never_deletes_a_folder_of_something_else(packed: Packed, tmp_path: Path) -> None:
    source, plan, codes, _ = packed
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="no artifact"):
        write_packed(tmp_path / "home", source, plan, codes, overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_parts_of_another_plan_are_refused_and_nothing_is_left(packed: Packed, tmp_path: Path) -> None:
    source, plan, codes, _ = packed
    last = [planned.name for planned in plan.tensors if planned.layout.format == "scalar"][-1]

    def parts(planned: object) -> dict[str, torch.Tensor]:
        found = pack_codes(codes[planned.name])  # type: ignore[attr-defined]
        return found | {"scale": found["scale"][:, :0]} if planned.name == last else found  # type: ignore[attr-defined]

    with pytest.raises(QuantizationError, match=f"{last}: does not fit the plan.*quantize it again"):
        write_artifact(
            tmp_path / "out", source, plan, parts, {}, tokenizer=None, provenance=PROVENANCE, overwrite=False
        )
    assert list(tmp_path.iterdir()) == []


def test_interruption_leaves_the_old_artifact(packed: Packed, tmp_path: Path) -> None:
    source, plan, codes, _ = packed
    out = write_packed(tmp_path / "out", source, plan, codes)
    before = contents(out)

    def interrupt(name: str, done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_packed(out, source, plan, codes_of(plan, seed=3), overwrite=True, on_tensor=interrupt)
    assert contents(out) == before and list(tmp_path.iterdir()) == [out]


def test_full_disk_is_one_line_and_leaves_nothing(packed: Packed, tmp_path: Path) -> None:
    source, plan, codes, _ = packed

    def fill(name: str, done: int, total: int) -> None:
        if done == total:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="the disk is full"):
        write_packed(tmp_path / "out", source, plan, codes, on_tensor=fill)
    assert list(tmp_path.iterdir()) == []


def test_kept_value_that_does_not_fit_its_dtype_is_named(packed: Packed, tmp_path: Path) -> None:
    source, plan, codes, _ = packed
    name = "blocks.0.ln1.weight"

    class Large:
        def __getattr__(self, attribute: str) -> object:
            return getattr(source, attribute)

        def tensor(self, asked: str) -> torch.Tensor:
            return source.tensor(asked) * (1e39 if asked == name else 1)

    with pytest.raises(QuantizationError, match=f"{name}.*do not fit bfloat16"):
        write_packed(tmp_path / "out", Large(), plan, codes)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_plan_of_another_model_is_refused(packed: Packed, tmp_path: Path) -> None:
    _, plan, codes, _ = packed
    other = tiny_source(tmp_path, plan.spec.version, seed=5)
    with pytest.raises(PlanError, match="another model"):
        write_packed(tmp_path / "out", other, plan, codes)
    assert not (tmp_path / "out").exists()


def test_software_versions_are_plain_and_repeatable() -> None:
    versions = software_versions()
    assert versions == software_versions() and len(versions["code_version"]) == 64
    assert set(versions["libraries"]) == {"numpy", "pyarrow", "safetensors", "tokenizers", "torch"}
