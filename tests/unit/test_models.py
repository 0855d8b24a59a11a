"""Blocks of both versions: sequence and recurrent mode, states, sites, and the equations checked by a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rwkvq.checkpoint.names import weights_of
from rwkvq.checkpoint.reader import Checkpoint, open_checkpoint
from rwkvq.checkpoint.spec import ModelSpec, Version
from rwkvq.models import (
    BlockState,
    batches_at_once,
    embed,
    final_norm,
    fitting_batch,
    load_block,
    observe_block,
    run_block,
)
from tests.tiny import tiny_spec, write_tiny

VERSIONS: tuple[Version, ...] = ("x060", "x070")


def _model(tmp_path: Path, version: Version) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path / "model.pth", version))


def _input(time: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, time, 128, generator=torch.Generator().manual_seed(3), dtype=dtype)


def _run(
    model: Checkpoint, x: Tensor, states: list[BlockState | None] | None = None
) -> tuple[Tensor, list[BlockState | None]]:
    """All blocks; returns the last output and the states."""
    v_first, after = None, []
    for index in range(model.spec.layers):
        weights = load_block(model, index, x.dtype)
        state = states[index] if states else None
        x, new, v_first = run_block(model.spec, index, weights, x, state=state, v_first=v_first)
        after.append(new)
    return x, after


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_recurrent_steps_equal_the_sequence(
    tmp_path: Path, version: Version, dtype: torch.dtype, tolerance: float
) -> None:
    model, x = _model(tmp_path, version), _input(45, dtype=dtype)
    whole, last = _run(model, x)
    states: list[BlockState | None] | None = None
    steps = []
    for t in range(x.shape[1]):
        y, states = _run(model, x[:, t : t + 1], states)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=tolerance)
    for step, sequence in zip(states or [], last, strict=True):
        assert step is not None and sequence is not None
        assert step.wkv.shape == (2, 2, 64, 64) and step.att_shift.shape == (2, 128)
        for name in ("att_shift", "ffn_shift", "wkv"):
            torch.testing.assert_close(getattr(step, name), getattr(sequence, name), rtol=0, atol=tolerance)


@pytest.mark.parametrize("version", VERSIONS)
def test_sequence_may_be_cut_anywhere(tmp_path: Path, version: Version) -> None:
    model, x = _model(tmp_path, version), _input(70)
    whole, _ = _run(model, x)
    first, states = _run(model, x[:, :33])
    second, _ = _run(model, x[:, 33:], states)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_of_a_batch_do_not_mix_and_the_future_is_not_seen(tmp_path: Path, version: Version) -> None:
    model, x = _model(tmp_path, version), _input(40)
    whole, _ = _run(model, x)
    alone, _ = _run(model, x[1:])
    torch.testing.assert_close(alone[0], whole[1], rtol=0, atol=1e-5)
    changed = x.clone()
    changed[:, 25:] += 1
    torch.testing.assert_close(_run(model, changed)[0][:, :25], whole[:, :25], rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("index", [0, 1])
def test_sites_are_those_of_the_weights(tmp_path: Path, version: Version, index: int) -> None:
    model, x = _model(tmp_path, version), _input(20)
    weights = load_block(model, index)
    v_first = _input(20) if version == "x070" and index else None
    seen: dict[str, Tensor] = {}

    def observe(site: str, value: Tensor) -> None:
        assert site not in seen and torch.isfinite(value).all()
        seen[site] = value

    run_block(model.spec, index, weights, x, v_first=v_first, observe=observe)
    wanted = {w.site: w for w in weights_of(model.spec, {name: model.shape(name) for name in model.names()}) if w.site}
    wanted = {w.site: w for w in wanted.values() if w.block is not None and (w.site != "v_rank" or index)}
    assert set(seen) == set(wanted)
    assert all(value.shape == (2, 20, wanted[site].shape[-1]) for site, value in seen.items())
    again: dict[str, Tensor] = {}
    observe_block(model.spec, index, weights, x, again.__setitem__, v_first=v_first)
    assert again.keys() == seen.keys() and all(torch.equal(again[site], seen[site]) for site in seen)


class _Products(TorchFunctionMode):
    """Records what each weight, told by its address, is multiplied with."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {tensor.data_ptr(): name for name, tensor in weights.items() if name != "att.time_maa_w2"}
        for path, part in zip("wkvrg", weights.get("att.time_maa_w2", ()), strict=False):
            self.names[part.data_ptr()] = f"att.time_maa_w2.{path}"
        self.operands: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.linear, Tensor.matmul, Tensor.__matmul__, Tensor.mul, Tensor.__mul__, torch.addcmul):
            name = self.names.get(args[-1].data_ptr()) if isinstance(args[-1], Tensor) else None
            if name is not None:
                self.operands[name] = args[-2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("time", [1, 20])
def test_each_site_is_what_its_weight_is_multiplied_with(tmp_path: Path, version: Version, time: int) -> None:
    model, x = _model(tmp_path, version), _input(time)
    weights, seen = load_block(model, 1), dict[str, Tensor]()
    v_first = _input(time) if version == "x070" else None
    with _Products(weights) as products:
        run_block(model.spec, 1, weights, x, v_first=v_first, observe=seen.__setitem__)
    checked = 0
    for weight in weights_of(model.spec, {name: model.shape(name) for name in model.names()}):
        name = weight.name.removeprefix("blocks.1.")
        # these five are added to the data-dependent part before they multiply att_dx
        is_mixed_in = name in {f"att.time_maa_{path}" for path in "wkvrg"}
        if weight.block == 1 and weight.site and not is_mixed_in:
            assert torch.equal(products.operands[name], seen[weight.site]), name
            checked += 1
    assert checked == {"x060": 16 + 8 - 5, "x070": 14 + 10}[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_site_times_weight_is_what_the_block_computes(tmp_path: Path, version: Version) -> None:
    """Changing a weight W by dW changes what follows as if its site's x gave dW x: shown for the last matrix."""
    model, x = _model(tmp_path, version), _input(20)
    weights = load_block(model, 0)
    seen: dict[str, Tensor] = {}
    before, _, _ = run_block(model.spec, 0, weights, x, observe=seen.__setitem__)
    delta = 0.1 * torch.randn(weights["ffn.value.weight"].shape, generator=torch.Generator().manual_seed(5))
    after, _, _ = run_block(model.spec, 0, weights | {"ffn.value.weight": weights["ffn.value.weight"] + delta}, x)
    change = F.linear(seen["ffn_value"], delta)
    if version == "x060":
        change = change * torch.sigmoid(F.linear(seen["ffn_receptance"], weights["ffn.receptance.weight"]))
    torch.testing.assert_close(after - before, change, rtol=0, atol=1e-4)


def test_v_first_is_the_value_projection_of_block_0(tmp_path: Path) -> None:
    model, x = _model(tmp_path, "x070"), _input(9)
    weights, seen = load_block(model, 0), dict[str, Tensor]()
    _, _, v_first = run_block(model.spec, 0, weights, x, observe=seen.__setitem__)
    assert v_first is not None
    torch.testing.assert_close(v_first, F.linear(seen["xv"], weights["att.value.weight"]))
    _, _, same = run_block(model.spec, 1, load_block(model, 1), x, v_first=v_first)
    assert same is v_first


def test_v_first_given_wrongly_is_an_error(tmp_path: Path) -> None:
    model, x = _model(tmp_path, "x070"), _input(3)
    with pytest.raises(ValueError, match="v_first"):
        run_block(model.spec, 1, load_block(model, 1), x)
    with pytest.raises(ValueError, match="v_first"):
        run_block(model.spec, 0, load_block(model, 0), x, v_first=x)


@pytest.mark.parametrize("version", VERSIONS)
def test_load_block_gives_flat_vectors_and_no_unused_tensors(tmp_path: Path, version: Version) -> None:
    model = _model(tmp_path, version)
    first, second = load_block(model, 0, torch.float64), load_block(model, 1)
    assert {"ln0.weight", "ln0.bias"} == {name for name in first if name.startswith("ln0")}
    assert all(tensor.dtype == torch.float64 for tensor in first.values())
    assert not any(tensor.shape[:2] == (1, 1) for tensor in second.values())
    assert ("att.v1" in second) == (version == "x070") and "att.v1" not in first


def test_embed_and_final_norm_normalise() -> None:
    generator = torch.Generator().manual_seed(0)
    emb = torch.randn(10, 128, generator=generator).bfloat16()
    weight, bias = torch.full((1, 1, 128), 2.0), torch.full((1, 1, 128), 0.5)
    x = embed(emb, weight, bias, torch.tensor([[3, 3, 9]]))
    assert x.shape == (1, 3, 128) and x.dtype == torch.float32 and torch.equal(x[0, 0], x[0, 1])
    for values in (x, final_norm(5 * x, weight, bias)):
        torch.testing.assert_close(values.mean(-1), torch.full((1, 3), 0.5), rtol=0, atol=1e-5)
        torch.testing.assert_close(values.std(-1, correction=0), torch.full((1, 3), 2.0), rtol=1e-4, atol=0)


def test_wide_models_run_fewer_sequences_at_once() -> None:
    wide = ModelSpec("x060", 61, 4096, 64, 64, 14336, 65536, {"mix": 64, "decay": 128})
    assert fitting_batch(tiny_spec("x060"), 512, 4) == 4
    assert fitting_batch(wide, 512, 4) == 1 and fitting_batch(wide, 128, 8) == 3
    assert fitting_batch(wide, 100_000, 4) == 1  # never none
    assert batches_at_once(tiny_spec("x060"), 2048, 16) == 16
    assert batches_at_once(wide, 512, 16) == 4 and batches_at_once(wide, 512, 2) == 2
    assert batches_at_once(wide, 100_000, 4) == 1


def test_a_block_can_be_loaded_in_part(tmp_path: Path) -> None:
    model = open_checkpoint(write_tiny(tmp_path / "m.pth", "x060"))
    whole, part = load_block(model, 1), load_block(model, 1, without=("ffn.value.weight",))
    assert set(whole) - set(part) == {"ffn.value.weight"}
