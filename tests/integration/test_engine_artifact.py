"""An artifact runs without its checkpoint, and as its own export does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rwkvq.artifact.reader import Artifact
from rwkvq.checkpoint.writer import export_checkpoint
from rwkvq.engine.model import Engine, open_model

ARTIFACTS = Path(__file__).parents[1] / "golden" / "artifact"


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_an_artifact_runs_like_its_export(tmp_path: Path, version: str) -> None:
    artifact = open_model(ARTIFACTS / version)
    assert isinstance(artifact, Artifact)
    exported = tmp_path / "exported.safetensors"
    export_checkpoint(artifact, exported, dtype=torch.float32, overwrite=False)
    ids = torch.randint(0, artifact.spec.vocab, (2, 40), generator=torch.Generator().manual_seed(0))
    engines = Engine(artifact), Engine(open_model(exported)), Engine(artifact, resident=False)
    logits = [engine.logits(engine.hidden(ids)) for engine in engines]
    assert logits[0].std() > 0.1
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
