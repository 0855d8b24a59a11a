"""Logits of trained models against a float64 evaluation by an independent plain recurrence (48 tokens, zero state)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rwkvq.checkpoint.reader import Checkpoint, open_checkpoint
from rwkvq.models import BlockState, embed, final_norm, load_block, run_block

GOLDEN = Path(__file__).parent
DEMO = GOLDEN.parents[1] / "data" / "demo"
TOLERANCE = 2e-3


def _logits(model: Checkpoint, ids: Tensor, step: int) -> Tensor:
    """Logits [T, V] of ids [1, T], `step` tokens at a time."""
    norms = {name: model.tensor(name).float() for name in model.names() if name.startswith(("ln_out", "blocks.0.ln0"))}
    embedding, head = model.tensor("emb.weight"), model.tensor("head.weight").float()
    blocks = [load_block(model, index) for index in range(model.spec.layers)]
    states: list[BlockState | None] = [None] * model.spec.layers
    outputs = []
    for part in ids.split(step, dim=1):
        x, v_first = embed(embedding, norms["blocks.0.ln0.weight"], norms["blocks.0.ln0.bias"], part), None
        for index, weights in enumerate(blocks):
            x, states[index], v_first = run_block(model.spec, index, weights, x, state=states[index], v_first=v_first)
        outputs.append(final_norm(x, norms["ln_out.weight"], norms["ln_out.bias"])[0] @ head.T)
    return torch.cat(outputs)


@pytest.mark.parametrize("step", [48, 1, 19], ids=["sequence", "recurrent", "pieces"])
@pytest.mark.parametrize("file", ["rwkv7-9m.pth", "rwkv6-10m.safetensors"])
def test_logits_of_trained_models(file: str, step: int) -> None:
    golden = torch.from_numpy(np.load(GOLDEN / f"{Path(file).stem}.npy"))
    ids = torch.tensor([json.loads((GOLDEN / "ids.json").read_text())])
    found = _logits(open_checkpoint(DEMO / file), ids, step)
    assert (found - golden).abs().max() <= TOLERANCE
    assert torch.equal(found.argmax(-1), golden.argmax(-1))
