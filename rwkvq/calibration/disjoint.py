"""The proof that an evaluation set shares no run of tokens with the calibration windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHINGLE = 32
"""Tokens a run: text of this length is not met twice by chance, and a copied passage is seen at any offset."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that multiplying by it loses nothing modulo 2**64."""

Ids = NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many of the runs of `size` tokens in an evaluation set (`positions`) occur in the windows (`shared`)."""

    shared: int
    positions: int
    size: int


def shared_shingles(calibration: Ids, evaluation: Iterable[Ids], size: int = SHINGLE) -> Overlap:
    """Look up every run of `size` tokens of the evaluation sequences among those of the calibration windows.

    calibration [windows, length]; evaluation: sequences [length], each of its own length, or an array [rows, length].
    A run never crosses the end of a window or sequence. Runs are compared by a rolling hash, hits token by token, so
    `shared` is exact. Windows shorter than `size` are compared as a whole: size is then their length.
    """
    size = min(size, calibration.shape[1])
    known = _shingles(calibration, size)
    hashes, order = _sorted_hashes(known)
    shared = positions = 0
    for sequences in _by_length(evaluation):
        if sequences.shape[1] < size:
            continue
        shingles = _shingles(sequences, size)
        found = _rolling_hash(shingles)
        positions += len(found)
        first = np.minimum(np.searchsorted(hashes, found), len(hashes) - 1)
        hits = np.flatnonzero(hashes[first] == found)
        is_same = (known[order[first[hits]]] == shingles[hits]).all(axis=1)
        shared += int(is_same.sum())
        for hit in hits[~is_same]:  # another run has this hash too: look at all that do
            last = np.searchsorted(hashes, found[hit], side="right")
            shared += bool((known[order[first[hit] : last]] == shingles[hit]).all(axis=1).any())
    return Overlap(shared, positions, size)


def _by_length(sequences: Iterable[Ids]) -> Iterator[Ids]:
    """The sequences as arrays [rows, length], one a length: few large arrays instead of many small ones."""
    groups: dict[int, list[Ids]] = {}
    for sequence in sequences:
        groups.setdefault(len(sequence), []).append(sequence)
    for length in sorted(groups):
        yield np.stack(groups[length])


def _shingles(ids: Ids, size: int) -> Ids:
    """All runs of `size` tokens inside the rows of ids [rows, length]: [rows * (length - size + 1), size]."""
    return np.lib.stride_tricks.sliding_window_view(ids, size, axis=1).reshape(-1, size)


def _rolling_hash(shingles: Ids) -> NDArray[np.uint64]:
    """Polynomial hash modulo 2**64 of each run [runs, size], one column at a time."""
    value = np.zeros(len(shingles), np.uint64)
    for column in range(shingles.shape[1]):
        value = value * _BASE + shingles[:, column].astype(np.uint64)
    return value


def _sorted_hashes(shingles: Ids) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
    hashes = _rolling_hash(shingles)
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order
