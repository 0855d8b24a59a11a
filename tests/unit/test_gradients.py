"""The backward pass: against finite differences, against autograd through the whole model, and as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvq.calibration import gradients
from rwkvq.calibration.activations import used_windows, write_activations
from rwkvq.calibration.gradients import (
    gradients_path,
    output_blocks,
    read_gradients,
    watched_windows,
    write_gradients,
)
from rwkvq.calibration.taps import tapped
from rwkvq.calibration.windows import Windows, model_inputs
from rwkvq.checkpoint.names import Weight, weights_of
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.errors import ActivationError
from rwkvq.models import embed, load_block, run_block, run_block_with_graph
from rwkvq.models.layers import layer_norm
from rwkvq.quantize.inputs import Calibration, collect_inputs, token_weights
from tests.unit.test_activations import SETTINGS, bytes_of, checkpoint, made_up_windows

VERSIONS = ("x060", "x070")


def linear_weights(source: Checkpoint, block: int) -> list[Weight]:
    shapes = {name: source.shape(name) for name in source.names()}
    return [
        weight
        for weight in weights_of(source.spec, shapes)
        if weight.block == block and weight.weight_class in ("matrix", "lora")
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("block", [0, 1])
def test_gradients_are_finite_differences(tmp_path: Path, version: str, block: int) -> None:
    source = checkpoint(tmp_path, version)
    watched = linear_weights(source, block)
    weights = {name: tensor.double() for name, tensor in load_block(source, block).items()}
    generator = torch.Generator().manual_seed(0)
    shape = (2, 37, source.spec.width)
    x, direction, v_first = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    given = v_first if version == "x070" and block else None

    def value(weights: dict[str, Tensor], x: Tensor) -> float:
        return float((run_block(source.spec, block, weights, x, v_first=given)[0] * direction).sum())

    seen: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, gradient: Tensor) -> None:
        seen[name] = torch.einsum("bto,bti->oi", gradient, x)

    leaf = x.clone().requires_grad_()
    y, _ = run_block_with_graph(source.spec, block, tapped(weights, watched, note), leaf, v_first=given)
    (found,) = torch.autograd.grad((y * direction).sum(), leaf)
    step = 1e-5
    probe = torch.randn(shape, generator=generator, dtype=torch.float64)
    slope = (value(weights, x + step * probe) - value(weights, x - step * probe)) / (2 * step)
    assert float((found * probe).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-5)
    assert set(seen) == {weight.name for weight in watched}
    for weight in watched:
        name = weight.tensor.split(".", 2)[2]
        change = torch.zeros_like(weights[name])
        part = change if weight.index is None else change[weight.index]
        part += torch.randn(part.shape, generator=generator, dtype=torch.float64)
        up, down = ({**weights, name: weights[name] + sign * step * change} for sign in (1, -1))
        slope = (value(up, x) - value(down, x)) / (2 * step)
        gradient = seen[weight.name].T if weight.transposed else seen[weight.name]
        assert float((gradient * part).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-4), weight.name


def cached(tmp_path: Path, version: str, count: int = 5) -> tuple[Checkpoint, Windows, Path]:
    source, windows, cache = checkpoint(tmp_path, version), made_up_windows(count), tmp_path / "cache"
    write_activations(source, windows, cache, SETTINGS)
    return source, windows, cache


def whole_model_gradients(source: Checkpoint, windows: Windows, targets: Tensor, window: int) -> dict[str, Tensor]:
    """dL/dy [time, out] of every linear weight for one window, through one graph of the whole model."""
    seen: dict[str, Tensor] = {}
    ids = torch.from_numpy(model_inputs(windows.ids))[window : window + 1].long()
    names = ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias")
    x = embed(*(source.tensor(name).float() for name in names), ids).requires_grad_()
    v_first = None
    for block in range(source.spec.layers):
        taps = tapped(
            load_block(source, block),
            linear_weights(source, block),
            lambda name, _, gradient: seen.__setitem__(name, gradient[0]),
        )
        x, v_first = run_block_with_graph(source.spec, block, taps, x, v_first=v_first)
    with torch.enable_grad():
        normalised = layer_norm(
            x, *(source.tensor(f"ln_out.{part}").reshape(-1).float() for part in ("weight", "bias"))
        )
        loss = F.cross_entropy(normalised[0] @ source.tensor("head.weight").float().T, targets, reduction="sum")
    loss.backward()
    return seen


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    row = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = gradients.sampled(row.expand(20_000, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 1)
    shares = torch.bincount(drawn[:, 0], minlength=6) / 20_000
    torch.testing.assert_close(shares, row, rtol=0, atol=0.02)
    assert not shares[row == 0].any()


@pytest.mark.parametrize("version", VERSIONS)
def test_block_by_block_is_the_whole_model(tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, windows, cache = cached(tmp_path, version)
    length = windows.ids.shape[1]
    fixed = torch.arange(length) % 300 + 1
    monkeypatch.setattr(gradients, "sampled", lambda probabilities, _: fixed[: len(probabilities), None])
    write_gradients(source, windows, cache, tmp_path / "gradients", count=2, seed=0)
    chosen = watched_windows(windows.held_out, 2)
    expected = [whole_model_gradients(source, windows, fixed, window) for window in chosen]
    for block in range(source.spec.layers):
        found = read_gradients(tmp_path / "gradients", block, [item.name for item in linear_weights(source, block)])
        for name, sensitivity in found.items():
            seen = torch.cat([seen[name] for seen in expected]).double()
            fisher = seen.square().mean(0)
            # the block inputs in the cache are rounded to float16
            atol = 0.02 * float(fisher.max())
            torch.testing.assert_close(sensitivity.fisher.double(), fisher, rtol=0.05, atol=atol)
            products = seen.t() @ seen / len(seen)
            blocks, size = output_blocks(len(fisher))
            assert sensitivity.output_moment.shape == (blocks, size, size)
            for block_of_outputs, moment in enumerate(sensitivity.output_moment.double()):
                here = slice(block_of_outputs * size, (block_of_outputs + 1) * size)
                torch.testing.assert_close(moment, products[here, here], rtol=0.05, atol=atol)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [(32, (1, 32)), (256, (1, 256)), (320, (5, 64)), (384, (2, 192)), (672, (3, 224)), (4096, (16, 256)), (7, (1, 7))],
)
def test_blocks_of_outputs_hold_whole_heads_where_they_can(outputs: int, expected: tuple[int, int]) -> None:
    assert output_blocks(outputs) == expected


def test_fisher_guide_and_energy_are_what_they_say(tmp_path: Path) -> None:
    source, windows, cache = cached(tmp_path, "x070")
    write_gradients(source, windows, cache, tmp_path / "gradients", count=3, seed=1)
    (weight,) = [item for item in linear_weights(source, 1) if item.name.endswith("att.key.weight")]
    found = read_gradients(tmp_path / "gradients", 1, [weight.name])[weight.name]
    assert found.fisher.shape == (64,) and found.guide.shape == (3, 24)
    assert (found.fisher > 0).all() and (found.guide >= 0).all()
    calibration = Calibration(cache, tmp_path / "gradients", tmp_path)
    plain = collect_inputs(source, 1, [weight], (), calibration).second_moments[weight.name]
    assert found.energy == pytest.approx(float(plain.trace()), rel=0.1)  # on three of four windows
    guided = Calibration(cache, tmp_path / "gradients", tmp_path, guide=1.0)
    moment = collect_inputs(source, 1, [weight], {weight.name}, guided).second_moments[weight.name]
    assert float(moment.trace()) == pytest.approx(found.energy, rel=1e-3)
    blended = Calibration(cache, tmp_path / "gradients", tmp_path, guide=0.25)
    mixed = collect_inputs(source, 1, [weight], {weight.name}, blended)
    torch.testing.assert_close(mixed.second_moments[weight.name], 0.75 * plain + 0.25 * moment, rtol=1e-3, atol=1e-5)
    assert torch.equal(mixed.fisher[weight.name], found.fisher)
    assert used_windows(cache, 1) == ([1, 2, 3, 4], 24)
    assert token_weights(found, (4, 24), blended)[3].tolist() == [0.75] * 24


def test_statistics_of_some_batches_keep_their_tokens(tmp_path: Path) -> None:
    """Of the batches (0, 1), (2, 3), (4) every other one has windows 1 and 4, of which 1 is watched; 0 is held out."""
    source, windows, cache = cached(tmp_path, "x070")
    write_gradients(source, windows, cache, tmp_path / "gradients", count=1, seed=1)
    weight = linear_weights(source, 1)[0]

    def moment(guide: float, every: int) -> Tensor:
        calibration = Calibration(cache, tmp_path / "gradients", tmp_path, guide=guide, every=every)
        return collect_inputs(source, 1, [weight], {weight.name}, calibration).second_moments[weight.name]

    torch.testing.assert_close(moment(1.0, 2), 2 * moment(1.0, 1))
    plain, some = moment(0.0, 1), moment(0.0, 2)
    assert not torch.equal(plain, some) and float(some.trace()) == pytest.approx(float(plain.trace()), rel=0.2)


def test_workers_and_repetition_change_no_byte(tmp_path: Path) -> None:
    source, windows, cache = cached(tmp_path, "x070")
    for name, workers in (("a", 1), ("b", 3)):
        write_gradients(source, windows, cache, tmp_path / name, count=4, seed=0, workers=workers)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    write_gradients(source, windows, cache, tmp_path / "c", count=4, seed=1)
    assert bytes_of(tmp_path / "c") != bytes_of(tmp_path / "a")


def test_held_out_windows_are_not_watched(tmp_path: Path) -> None:
    flags = np.array([False, True, False, True, False])
    assert watched_windows(flags, 2) == [0, 2] and watched_windows(flags, 9) == [0, 2, 4]
    source, windows, cache = cached(tmp_path, "x060", count=3)
    before = write_gradients(source, windows, cache, tmp_path / "a", count=9, seed=0)
    assert read_gradients(tmp_path / "a", 0, [linear_weights(source, 0)[0].name])
    assert len(before) == source.spec.layers + 1
    with pytest.raises(ActivationError, match="every window is held out"):
        write_gradients(source, made_up_windows(2, held_out=2), cache, tmp_path / "b", count=1, seed=0)


@pytest.mark.parametrize("damage", ["missing", "short", "nan"])
def test_damaged_gradients_are_named(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, windows, cache = cached(tmp_path, "x060")
    folder = tmp_path / "gradients"
    write_gradients(source, windows, cache, folder, count=1, seed=0)
    path, name = gradients_path(folder, 1), linear_weights(source, 1)[0].name
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        monkeypatch.setattr(gradients, "is_finite", lambda tensor: False)
    with pytest.raises(ActivationError, match=r"block-001\.safetensors: .*run the gradients stage again"):
        read_gradients(folder, 1, [name])


def test_gradients_of_more_windows_than_the_cache_are_refused(tmp_path: Path) -> None:
    source, windows, cache = cached(tmp_path, "x060")
    write_gradients(source, windows, cache, tmp_path, count=4, seed=0)
    (found,) = read_gradients(tmp_path, 0, [linear_weights(source, 0)[0].name]).values()
    with pytest.raises(ActivationError, match="gradients stage again"):
        token_weights(found, (3, 24), Calibration(cache, tmp_path, tmp_path, guide=0.5))
