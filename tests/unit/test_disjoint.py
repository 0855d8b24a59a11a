"""The proof of disjointness: exact counts, at any offset, whatever the hash does."""

from __future__ import annotations

import numpy as np
import pytest

from rwkvq.calibration import disjoint
from rwkvq.calibration.disjoint import Overlap, shared_shingles


def random_ids(rows: int, length: int, seed: int, vocab: int = 5000) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, vocab, (rows, length)).astype(np.int32)


def test_unrelated_windows_share_nothing() -> None:
    assert shared_shingles(random_ids(8, 128, 0), random_ids(6, 100, 1)) == Overlap(0, 6 * 69, 32)


@pytest.mark.parametrize("shift", [1, 17, 63])
def test_a_copied_passage_is_found_at_a_shifted_offset(shift: int) -> None:
    calibration, evaluation = random_ids(8, 128, 0), random_ids(6, 128, 1)
    evaluation[3, shift : shift + 40] = calibration[5, 50:90]
    assert shared_shingles(calibration, evaluation).shared == 40 - 32 + 1


def test_one_token_less_than_a_run_is_not_enough() -> None:
    calibration, evaluation = random_ids(2, 128, 0), random_ids(2, 128, 1)
    evaluation[0, 10:41] = calibration[1, 50:81]
    assert shared_shingles(calibration, evaluation).shared == 0


def test_the_same_windows_share_everything() -> None:
    ids = random_ids(4, 64, 0)
    assert shared_shingles(ids, ids) == Overlap(4 * 33, 4 * 33, 32)


def test_a_run_across_two_windows_is_no_run() -> None:
    ids = random_ids(2, 64, 0)
    straddling = np.concatenate([ids[0, 48:], ids[1, :16]])[None]
    assert shared_shingles(ids, straddling) == Overlap(0, 1, 32)


def test_sequences_may_have_any_lengths() -> None:
    ids = random_ids(2, 64, 0)
    sequences = [ids[0, :31], ids[0, :32], ids[1, 5:50], random_ids(1, 40, 3)[0]]
    assert shared_shingles(ids, sequences) == Overlap(1 + 14, 1 + 14 + 9, 32)


def test_short_windows_are_compared_as_a_whole() -> None:
    ids = random_ids(3, 16, 0)
    assert shared_shingles(ids, ids[1:2]) == Overlap(1, 1, 16)


def test_counts_stay_exact_when_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, evaluation = random_ids(3, 50, 0, vocab=4), random_ids(3, 50, 1, vocab=4)
    evaluation[1, 3:20] = calibration[2, 20:37]
    monkeypatch.setattr(disjoint, "_rolling_hash", lambda runs: (runs[:, 0] % 2).astype(np.uint64))
    known = {tuple(row[i : i + 6]) for row in calibration.tolist() for i in range(45)}
    expected = sum(tuple(row[i : i + 6]) in known for row in evaluation.tolist() for i in range(45))
    assert expected >= 12
    assert shared_shingles(calibration, evaluation, size=6) == Overlap(expected, 3 * 45, 6)
