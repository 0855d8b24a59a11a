"""Calibration under random input: damage is found or harmless, sums merge, overlaps are counted exactly."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvq.calibration.cache import CacheKey, CacheReader, CacheShape, CacheWriter
from rwkvq.calibration.disjoint import Overlap, shared_shingles
from rwkvq.calibration.statistics import ChannelImportance, SecondMoment
from rwkvq.errors import ActivationError

KEY = CacheKey("model", "windows", "code")
SHAPE = CacheShape(windows=3, length=5, width=8, held_out=(1,), has_v_first=False)


def cache_bytes(x: torch.Tensor) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        with CacheWriter(path, "input of block 0", KEY, SHAPE, "float16") as writer:
            writer.add(x)
        return path.read_bytes()


VALUES = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).half().float()
WHOLE = cache_bytes(VALUES)


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_is_found_or_changes_no_value(position: int, flips: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        path.write_bytes(WHOLE[:position] + bytes([WHOLE[position] ^ flips]) + WHOLE[position + 1 :])
        try:
            with CacheReader(path, "input of block 0") as reader:
                reader.expect(KEY)
                reader.check()
                found = reader.read(0, reader.shape.windows)
        except ActivationError as error:
            assert "\n" not in str(error)
            assert str(path) in str(error)
        else:
            assert torch.equal(found, VALUES)


@given(st.integers(0, 2**31), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 140))
@settings(max_examples=30, deadline=None)
def test_second_moments_merge_in_any_grouping(seed: int, sizes: list[int], features: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(-9, 10, (size, 6, features), generator=generator).float() for size in sizes]
    whole, merged = SecondMoment(features), SecondMoment(features)
    whole.add(torch.cat(parts))
    for part in parts:
        single = SecondMoment(features)
        single.add(part)
        merged.merge(single)
    assert merged.tokens == whole.tokens
    assert torch.equal(merged.finish(), whole.finish())


@given(st.integers(0, 2**31), st.floats(0.125, 8))
@settings(max_examples=30, deadline=None)
def test_importance_grows_with_the_square_of_the_input(seed: int, scale: float) -> None:
    x = torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(seed))
    single, scaled = (ChannelImportance(5, "second_moment", 95) for _ in range(2))
    single.add(x)
    scaled.add(scale * x)
    torch.testing.assert_close(scaled.finish(), scale**2 * single.finish(), rtol=1e-4, atol=0)


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 4))
@settings(max_examples=50, deadline=None)
def test_shared_runs_are_counted_exactly(seed: int, size: int, vocab: int) -> None:
    random = np.random.default_rng(seed)
    calibration, evaluation = random.integers(0, vocab, (2, 12)), random.integers(0, vocab, (3, 9))
    known = {tuple(row[i : i + size]) for row in calibration.tolist() for i in range(13 - size)}
    looked_up = [tuple(row[i : i + size]) in known for row in evaluation.tolist() for i in range(10 - size)]
    assert shared_shingles(calibration, evaluation, size) == Overlap(sum(looked_up), len(looked_up), size)
