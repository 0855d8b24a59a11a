"""What the loss means to embedding and head: against autograd through the whole model, against KL, and as a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvq.calibration import gradients, outer
from rwkvq.calibration.gradients import gradients_path, watched_windows, write_gradients
from rwkvq.calibration.outer import HeadSums, read_outer
from rwkvq.calibration.windows import model_inputs
from rwkvq.checkpoint.names import OUTER
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.device import CPU
from rwkvq.errors import ActivationError
from rwkvq.models import load_block, run_block_with_graph
from rwkvq.models.layers import layer_norm
from tests.unit.test_gradients import VERSIONS, cached


def norm_of(source: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
    weight, bias = (source.tensor(f"{name}.{part}").reshape(-1).float() for part in ("weight", "bias"))
    return weight, bias


@torch.enable_grad()
def final_hidden(source: Checkpoint, rows: Tensor) -> Tensor:
    """The input of the head [time, width] for rows [time, width] of the embedding."""
    x, v_first = layer_norm(rows, *norm_of(source, "blocks.0.ln0"))[None], None
    for block in range(source.spec.layers):
        x, v_first = run_block_with_graph(source.spec, block, load_block(source, block), x, v_first=v_first)
    return layer_norm(x, *norm_of(source, "ln_out"))[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_both_ends_are_those_of_the_whole_model(tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, windows, cache = cached(tmp_path, version)
    fixed = torch.arange(windows.ids.shape[1]) % 300 + 1
    monkeypatch.setattr(gradients, "sampled", lambda probabilities, _: fixed[: len(probabilities), None])
    write_gradients(source, windows, cache, tmp_path / "gradients", count=2, seed=0)
    emb, head = (source.tensor(name).float() for name in OUTER)
    ids = torch.from_numpy(model_inputs(windows.ids)).long()[watched_windows(windows.held_out, 2)]
    found, hidden = [], []
    for window in ids:
        rows = emb[window].requires_grad_()
        x = final_hidden(source, rows)
        with torch.enable_grad():
            loss = F.cross_entropy(x @ head.T, fixed, reduction="sum")
        found.append(torch.autograd.grad(loss, rows)[0])
        hidden.append(x.detach())
    gradient, x = torch.cat(found).double(), torch.cat(hidden).double()
    seen = read_outer(tmp_path / "gradients")
    close = {"rtol": 0.05, "atol": 0.02}  # the block inputs in the cache are rounded to float16
    scale = float((gradient.T @ gradient).diagonal().mean()) / len(gradient)
    moment = seen["emb.weight"].second_moment.double()
    torch.testing.assert_close(moment / scale, gradient.T @ gradient / len(gradient) / scale, **close)
    shares = torch.zeros(len(emb), dtype=torch.float64)
    shares.index_add_(0, ids.flatten(), gradient.square().sum(1))
    torch.testing.assert_close(seen["emb.weight"].fisher.double(), shares / shares.sum(), rtol=0.05, atol=1e-4)
    p = (x @ head.double().T).softmax(-1)
    torch.testing.assert_close(seen["head.weight"].fisher.double(), (p * (1 - p)).mean(0), rtol=0.05, atol=1e-5)
    torch.testing.assert_close(seen["head.weight"].second_moment.double(), x.T @ x / len(x), **close)


def test_the_head_predicts_what_an_error_costs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(400, 32, generator=generator), torch.randn(100, 32, generator=generator) / 4
    error = 0.02 * torch.randn(100, 32, generator=generator)
    sums = HeadSums(100, 32, CPU)
    for part in torch.split(x, 150):
        some = HeadSums(100, 32, CPU)
        some.add((part @ head.T).softmax(-1), part)
        sums.merge(some)
    found = sums.finish()
    predicted = 0.5 * float(found.fisher @ ((error @ found.second_moment) * error).sum(1))
    p, q = ((x @ weight.T).double().log_softmax(-1) for weight in (head, head + error))
    assert predicted == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.05)


@pytest.mark.parametrize("damage", ["missing", "short", "nan"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, windows, cache = cached(tmp_path, "x060")
    write_gradients(source, windows, cache, tmp_path, count=1, seed=0)
    path = gradients_path(tmp_path, None)
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        monkeypatch.setattr(outer, "is_finite", lambda tensor: False)
    with pytest.raises(ActivationError, match=r"outer\.safetensors: .*run the gradients stage again"):
        read_outer(tmp_path)
