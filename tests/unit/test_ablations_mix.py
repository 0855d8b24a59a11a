"""Mixes of artifacts: ends equal their artifacts, every weight comes from its line, bits add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rwkvq.ablations.mix import FLOAT, ROWS, MixSource, Subject, bits_of, identity_of, row_block
from rwkvq.artifact.reader import Artifact, open_artifact
from rwkvq.artifact.writer import write_artifact
from rwkvq.checkpoint.names import extract, weights_of
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.checkpoint.spec import Version
from rwkvq.engine.model import Engine
from rwkvq.plan.bits import totals
from rwkvq.plan.policies import make_plan
from rwkvq.plan.tensor import PlannedTensor
from rwkvq.quantize.block import quantize_tensor
from rwkvq.quantize.inputs import NOTHING
from rwkvq.settings import PlanSettings, Policy, QuantizeSettings
from tests.packed import tiny_source

Arms = tuple[Checkpoint, dict[str, Artifact]]


def pack(folder: Path, source: Checkpoint, policy: Policy) -> Artifact:
    """An artifact of a policy that needs no statistics."""
    plan = make_plan(source, [], PlanSettings(policy=policy), QuantizeSettings(), 0)
    weights = {w.name: w for w in weights_of(source.spec, {name: source.shape(name) for name in source.names()})}

    def parts(entry: PlannedTensor) -> dict[str, torch.Tensor]:
        return quantize_tensor(extract(source.tensor(entry.tensor), weights[entry.name]).float(), entry, NOTHING)[0]

    write_artifact(folder, source, plan, parts, {}, tokenizer=None, provenance={}, overwrite=True)
    return open_artifact(folder)


@pytest.fixture(scope="module", params=["x060", "x070"])
def arms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Arms:
    version: Version = request.param
    folder = tmp_path_factory.mktemp("mix")
    source = tiny_source(folder, version)
    policies: dict[str, Policy] = {"sq": "rtn", "vq": "kmeans"}
    return source, {line: pack(folder / line, source, policy) for line, policy in policies.items()}


def decided(artifact: Artifact) -> list[PlannedTensor]:
    return [row for row in artifact.plan.tensors if row.weight_class in ("matrix", "lora")]


def all_of(artifact: Artifact, line: str) -> dict[str, tuple[str, ...]]:
    return {row.name: (line,) for row in decided(artifact)}


def test_a_mix_of_all_sq_has_the_logits_of_the_artifact(arms: Arms) -> None:
    source, artifacts = arms
    mix = MixSource(Subject("vq", all_of(artifacts["vq"], "sq")), source, artifacts)
    ids = torch.arange(1, 41).reshape(2, 20)
    ours, theirs = Engine(mix), Engine(artifacts["sq"])
    assert torch.equal(ours.logits(ours.hidden(ids)), theirs.logits(theirs.hidden(ids)))
    other = Engine(artifacts["vq"])
    assert not torch.equal(ours.logits(ours.hidden(ids)), other.logits(other.hidden(ids)))


def test_every_weight_comes_from_its_line(arms: Arms) -> None:
    source, artifacts = arms
    names = [row.name for row in decided(artifacts["sq"])]
    choice = {name: (("sq", "vq", FLOAT)[index % 3],) for index, name in enumerate(names)}
    mix = MixSource(Subject("vq", choice), source, artifacts)
    for weight in weights_of(source.spec, {name: source.shape(name) for name in source.names()}):
        (line,) = choice.get(weight.name, ("vq",))
        found = extract(mix.tensor(weight.tensor), weight).float()
        expected = (
            extract(source.tensor(weight.tensor), weight) if line == FLOAT else artifacts[line].weight(weight.name)
        )
        assert torch.equal(found, expected.float().reshape(found.shape)), weight.name
        assert mix.tensor(weight.tensor).dtype == mix.dtype(weight.tensor)


def test_row_blocks_come_from_their_lines(arms: Arms) -> None:
    source, artifacts = arms
    name = "blocks.1.ffn.key.weight"  # 256 rows
    mix = MixSource(Subject("vq", {name: ("sq", "vq", "vq", "sq")}), source, artifacts)
    found = mix.tensor(name)
    for index, line in enumerate(("sq", "vq", "vq", "sq")):
        rows = slice(index * ROWS, (index + 1) * ROWS)
        assert torch.equal(found[rows], artifacts[line].tensor(name)[rows].float())


def test_bits_of_the_ends_are_those_of_the_artifacts(arms: Arms) -> None:
    _, artifacts = arms
    plans = {line: artifact.plan.tensors for line, artifact in artifacts.items()}
    for line, share in (("sq", 1.0), ("vq", 0.0)):
        found, expected = bits_of(Subject("vq", all_of(artifacts["vq"], line)), plans), totals(artifacts[line].plan)
        assert found is not None
        assert found.matrix == pytest.approx(expected.matrix_bits, abs=1e-12)
        assert found.body == pytest.approx(expected.body_bits, abs=1e-12)
        assert found.sq == share


def test_bits_of_a_mix_add_up(arms: Arms) -> None:
    _, artifacts = arms
    plans = {line: artifact.plan.tensors for line, artifact in artifacts.items()}
    rows = {line: {row.name: row for row in decided(artifact)} for line, artifact in artifacts.items()}
    half = list(rows["sq"])[::2]
    found = bits_of(Subject("vq", {name: ("sq",) for name in half}), plans)
    stored = sum(rows["sq" if name in half else "vq"][name].stored_bits for name in rows["vq"])
    weights = sum(row.numel for row in rows["vq"].values())
    assert found is not None and found.matrix == pytest.approx(stored / weights, abs=1e-12)
    assert found.sq == pytest.approx(sum(rows["sq"][name].numel for name in half) / weights)


def test_row_blocks_store_their_rows_and_a_bit_each(arms: Arms) -> None:
    _, artifacts = arms
    plans = {line: artifact.plan.tensors for line, artifact in artifacts.items()}
    name = "blocks.1.ffn.key.weight"
    row = next(row for row in plans["vq"] if row.name == name)
    assert sum(row_block(row, index).stored_bits for index in range(4)) == row.stored_bits
    assert sum(row_block(row, index).numel for index in range(4)) == row.numel
    whole, split = (bits_of(Subject("vq", {name: lines}), plans) for lines in (("vq",), ("vq",) * 4))
    weights = sum(row.numel for row in decided(artifacts["vq"]))
    assert whole is not None and split is not None
    assert split.matrix - whole.matrix == pytest.approx(4 / weights)


def test_weights_of_the_checkpoint_have_no_stored_bits(arms: Arms) -> None:
    _, artifacts = arms
    plans = {line: artifact.plan.tensors for line, artifact in artifacts.items()}
    assert bits_of(Subject(FLOAT), plans) is None


def test_equal_mixes_have_one_identity(arms: Arms) -> None:
    source, artifacts = arms
    plain = identity_of(Subject("vq"), source, artifacts)
    assert identity_of(Subject("vq", all_of(artifacts["vq"], "vq")), source, artifacts) == plain
    assert identity_of(Subject("vq", all_of(artifacts["vq"], "sq")), source, artifacts) != plain
