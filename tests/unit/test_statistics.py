"""Statistics of a block: accumulators against plain formulas, and the pass over a block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkvq.calibration import statistics
from rwkvq.calibration.activations import InputBatch
from rwkvq.calibration.sites import Needs, needs_of
from rwkvq.calibration.spill import Spilled
from rwkvq.calibration.statistics import (
    BlockAccumulator,
    ChannelImportance,
    SecondMoment,
    Weighting,
    accumulate,
    collect,
    percentile_over_time,
)
from rwkvq.checkpoint.names import Weight, weights_of
from rwkvq.errors import ActivationError, OutputError
from rwkvq.models import run_block
from tests.tiny import tiny_spec, tiny_tensors

WEIGHTINGS: tuple[Weighting, ...] = ("second_moment", "mean_sq", "official", "none")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [1, 32, 128, 200, 300])
def test_the_second_moment_is_the_mean_outer_product(features: int) -> None:
    x = random(3, 20, features)
    moment = SecondMoment(features)
    for part in x.split(2):
        moment.add(part)
    rows = x.double().reshape(-1, features)
    found = moment.finish()
    assert moment.tokens == 60
    assert found.dtype == torch.float32
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), rows.T @ rows / 60, rtol=1e-5, atol=1e-6)


def test_merging_gives_what_one_pass_gives() -> None:
    # whole numbers, so that every sum is exact in any order
    x = torch.randint(-8, 9, (6, 10, 140), generator=torch.Generator().manual_seed(0)).float()
    whole, left, right = (SecondMoment(140) for _ in range(3))
    whole.add(x)
    left.add(x[:1])
    right.add(x[1:4])
    right.add(x[4:])
    left.merge(right)
    assert torch.equal(left.finish(), whole.finish())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_merging_importance_gives_what_one_pass_gives(weighting: Weighting) -> None:
    x = random(6, 50, 9)
    whole, left, right = (ChannelImportance(9, weighting, 95) for _ in range(3))
    whole.add(x)
    left.add(x[:1])
    right.add(x[1:])
    left.merge(right)
    torch.testing.assert_close(left.finish(), whole.finish(), rtol=1e-6, atol=0)


def test_nothing_seen_is_no_statistic() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        SecondMoment(4).finish()
    with pytest.raises(ValueError, match="no sequences"):
        ChannelImportance(4, "none", 99).finish()


@pytest.mark.parametrize("percentile", [100, 99.9, 99, 95, 50, 0])
@pytest.mark.parametrize("time", [1, 2, 17, 512])
def test_the_percentile_is_linear_between_ranks(time: int, percentile: float) -> None:
    x = random(2, time, 5)
    expected = torch.quantile(x.double(), percentile / 100, dim=1, keepdim=True)
    torch.testing.assert_close(percentile_over_time(x, percentile).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_second_moment_of_channels_clips_each_sequence_by_itself() -> None:
    # 101 tokens: the 99th percentile is the 2nd largest, so one outlier in one sequence counts as its runner-up
    x = torch.ones(2, 101, 1)
    x[1] *= 3
    x[0, 40] = 100.0
    importance = ChannelImportance(1, "second_moment", 99)
    importance.add(x)
    assert importance.finish().tolist() == [pytest.approx((1 + 9) / 2)]
    unclipped = ChannelImportance(1, "second_moment", 100)
    unclipped.add(x)
    assert unclipped.finish().tolist() == [pytest.approx(((100 + 100.0**2) / 101 + 9) / 2)]


def test_mean_sq_clips_both_signs_and_squares_the_mean_of_all() -> None:
    x = torch.full((2, 101, 1), -2.0)
    x[1] = 1.0
    x[0, 7] = -1000.0
    importance = ChannelImportance(1, "mean_sq", 99)
    importance.add(x)
    assert importance.finish().tolist() == [pytest.approx(((-2 + 1) / 2) ** 2)]


def test_official_is_the_mean_of_absolute_means() -> None:
    x = torch.tensor([[[1.0], [3.0]], [[-5.0], [-1.0]]])
    importance = ChannelImportance(1, "official", 99)
    importance.add(x)
    assert importance.finish().tolist() == [2.5]


def test_the_mean_of_the_token_shift_sees_the_last_token_only() -> None:
    x = random(2, 40, 6)
    dx = torch.cat([torch.zeros(2, 1, 6), x[:, :-1]], dim=1) - x
    importance = ChannelImportance(6, "official", 99)
    importance.add(dx)
    torch.testing.assert_close(importance.finish(), (x[:, -1].abs() / 40).mean(0), rtol=1e-4, atol=1e-6)


def test_none_weighs_all_channels_alike() -> None:
    importance = ChannelImportance(3, "none", 99)
    importance.add(random(2, 5, 3))
    assert importance.finish().tolist() == [1.0, 1.0, 1.0]


SPECS = {version: tiny_spec(version, width=64) for version in ("x060", "x070")}


def block_of(version: str, index: int) -> tuple[dict[str, Tensor], list[Weight]]:
    tensors = tiny_tensors(version, width=64, dtype=torch.float32)
    prefix = f"blocks.{index}."
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    flat = {
        name: tensor.reshape(-1) if tensor.dim() == 3 and len(tensor) == 1 else tensor
        for name, tensor in weights.items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return flat, [weight for weight in weights_of(SPECS[version], shapes) if weight.block == index]


def batches_of(version: str, index: int, held_out: tuple[int, ...] = ()) -> Iterator[InputBatch]:
    x, v_first = random(5, 20, 64), random(5, 20, 64, seed=1) if version == "x070" and index else None
    flags = torch.zeros(5, dtype=torch.bool)
    flags[list(held_out)] = True
    for start in range(0, 5, 2):
        part = slice(start, start + 2)
        yield InputBatch(x[part], None if v_first is None else v_first[part], flags[part])


@pytest.mark.parametrize("version", SPECS)
def test_collect_gives_every_weight_the_statistic_of_its_own_input(version: str) -> None:
    weights, wanted = block_of(version, 1)
    found = collect(SPECS[version], 1, weights, batches_of(version, 1), wanted)
    seen: dict[str, list[Tensor]] = {}
    for batch in batches_of(version, 1):
        run_block(
            SPECS[version],
            1,
            weights,
            batch.x,
            v_first=batch.v_first,
            observe=lambda site, x: seen.setdefault(site, []).append(x.double()),
        )
    inputs = {site: torch.cat(parts) for site, parts in seen.items()}
    assert found.tokens == 100
    assert found.held_out == 0
    for weight in wanted:
        if weight.weight_class in ("matrix", "lora"):
            rows = inputs[str(weight.site)].flatten(0, 1)
            moment = found.second_moments[str(weight.site)]
            assert moment.shape == (weight.shape[1], weight.shape[1])
            torch.testing.assert_close(moment.double(), rows.T @ rows / 100, rtol=1e-4, atol=1e-5)
        elif weight.weight_class == "elementwise":
            squares = inputs[str(weight.site)].square()
            expected = squares.minimum(torch.quantile(squares, 0.99, dim=1, keepdim=True)).mean((0, 1))
            assert found.importance[weight.name].shape == weight.shape
            torch.testing.assert_close(found.importance[weight.name].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("version", SPECS)
def test_only_what_is_wanted_is_computed(version: str) -> None:
    weights, all_weights = block_of(version, 0)
    wanted = [weight for weight in all_weights if weight.name.endswith("att.key.weight")]
    found = collect(SPECS[version], 0, weights, batches_of(version, 0), wanted)
    assert list(found.second_moments) == ["xk"]
    assert not found.importance


def test_held_out_windows_change_nothing() -> None:
    weights, wanted = block_of("x070", 1)
    with_them = collect(SPECS["x070"], 1, weights, batches_of("x070", 1, held_out=(0, 1, 3)), wanted)
    kept = [
        InputBatch(batch.x[i : i + 1], batch.v_first[i : i + 1], batch.held_out[i : i + 1])
        for batch in batches_of("x070", 1, held_out=(0, 1, 3))
        for i in range(len(batch.x))
        if not batch.held_out[i]
    ]
    without = collect(SPECS["x070"], 1, weights, kept, wanted)
    assert (with_them.tokens, with_them.held_out, without.held_out) == (40, 3, 0)
    for site, moment in without.second_moments.items():
        torch.testing.assert_close(with_them.second_moments[site], moment, rtol=1e-4, atol=1e-6)
    for name, importance in without.importance.items():
        torch.testing.assert_close(with_them.importance[name], importance, rtol=1e-4, atol=1e-6)


def test_nothing_but_held_out_windows_is_refused() -> None:
    weights, wanted = block_of("x060", 0)
    with pytest.raises(ActivationError, match="block 0: no window is left for statistics"):
        collect(SPECS["x060"], 0, weights, batches_of("x060", 0, held_out=(0, 1, 2, 3, 4)), wanted)


def test_a_block_may_be_accumulated_in_parts() -> None:
    weights, wanted = block_of("x070", 1)
    whole = collect(SPECS["x070"], 1, weights, batches_of("x070", 1, held_out=(4,)), wanted)
    parts = []
    for batch in batches_of("x070", 1, held_out=(4,)):
        parts.append(BlockAccumulator(needs_of(wanted), "second_moment", 99))
        accumulate(SPECS["x070"], 1, weights, [batch], parts[-1])
    for part in parts[1:]:
        parts[0].merge(part)
    merged = parts[0].finish()
    assert (merged.tokens, merged.held_out) == (whole.tokens, whole.held_out) == (80, 1)
    assert merged.second_moments.keys() == whole.second_moments.keys()
    for site, moment in whole.second_moments.items():
        torch.testing.assert_close(merged.second_moments[site], moment, rtol=1e-6, atol=0)
    for name, importance in whole.importance.items():
        torch.testing.assert_close(merged.importance[name], importance, rtol=1e-6, atol=0)


def test_moments_on_disk_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, needs = random(2, 30, 140), needs_of([])
    found = []
    for limit, scratch in ((1 << 30, tmp_path), (0, None), (0, tmp_path)):
        monkeypatch.setattr(statistics, "IN_MEMORY", limit)
        accumulator = BlockAccumulator(Needs(frozenset({"a", "b"}), needs.importance), "none", 100)
        accumulator.observe("a", x)
        accumulator.observe("b", x[..., :32])
        found.append(accumulator.finish(scratch).second_moments)
    memory, kept, disk = found
    assert memory["a"] is memory["a"] and kept["a"] is kept["a"] and disk["a"] is not disk["a"]
    assert set(disk) == {"a", "b"}
    assert all(torch.equal(disk[site], memory[site]) for site in disk)
    renamed = disk.renamed({"weight": "b"})
    assert list(renamed) == ["weight"] and torch.equal(renamed["weight"], memory["b"])
    assert not list(tmp_path.iterdir())  # the files have no names


def test_a_folder_that_takes_no_moments_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        Spilled.of([torch.ones(2, 2)], 2, tmp_path / "file")


def test_wide_batches_are_observed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(statistics, "fitting_batch", lambda spec, length, batch: 2)
    monkeypatch.setattr(statistics, "observe_block", lambda spec, index, weights, x, observe, v_first: seen.append(x))
    batch = InputBatch(random(5, 4, 8), None, torch.tensor([False, True, False, False, False]))
    accumulate(tiny_spec("x060"), 1, {}, [batch], BlockAccumulator(needs_of([]), "none", 100))
    assert [len(x) for x in seen] == [2, 2]
    assert torch.equal(torch.cat(seen), batch.x[[0, 2, 3, 4]])
