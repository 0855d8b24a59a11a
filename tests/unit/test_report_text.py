"""Numbers as text."""

from __future__ import annotations

import math

import pytest

from rwkvq.report.data import Estimate
from rwkvq.report.text import (
    bits_text,
    count_text,
    error_percent_text,
    estimate_text,
    number_text,
    percent_text,
    seconds_text,
    shared_decimals,
    size_text,
)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_999, "1.00 MB"),
        (18_930_617, "18.9 MB"),
        (7 * 10**9, "7.00 GB"),
    ],
)
def test_sizes_have_three_digits_and_never_a_thousand_of_a_unit(size: int | None, text: str) -> None:
    assert size_text(size) == text


def test_counts() -> None:
    assert [count_text(value) for value in (256, 999, 65_536, 9_417_472, 14_069_100_000)] == [
        "256",
        "999",
        "65.5 k",
        "9.42 M",
        "14.1 G",
    ]


def test_seconds() -> None:
    texts = [seconds_text(value) for value in (0.0, 0.049, 0.05, 9.94, 9.96, 99.4, 187.3, 3599.6)]
    assert texts == ["< 0.1 s", "< 0.1 s", "0.1 s", "9.9 s", "10 s", "99 s", "3 min 07 s", "60 min 00 s"]
    assert [seconds_text(value) for value in (5999.4, 5999.6, 7620, 300_000)] == [
        "99 min 59 s",
        "1 h 40 min",
        "2 h 07 min",
        "83 h 20 min",
    ]


def test_an_estimate_shows_two_digits_of_its_error() -> None:
    assert estimate_text(Estimate(0.055318, 0.00088)) == "0.05532 ± 0.00088"
    assert estimate_text(Estimate(28.3141, 0.4127)) == "28.31 ± 0.41"
    assert estimate_text(Estimate(0.8716, 0.0018), factor=100) == "87.16 ± 0.18"
    assert estimate_text(Estimate(12345.6, 789.0)) == "12,346 ± 789"


def test_an_estimate_without_error_shows_four_digits() -> None:
    assert estimate_text(Estimate(28.3141)) == "28.31"
    assert estimate_text(Estimate(28.3141, 0.0)) == "28.31"
    assert estimate_text(Estimate(28.3141), decimals=3) == "28.314"


def test_what_is_missing_or_not_finite_is_said() -> None:
    assert estimate_text(None) == bits_text(None) == number_text(None) == percent_text(None) == "–"
    assert estimate_text(Estimate(math.inf, math.nan)) == number_text(math.nan) == "not finite"
    assert estimate_text(Estimate(3.0, math.nan), decimals=2) == "3.00"
    assert error_percent_text(math.inf) == "–"


def test_shared_decimals_follow_the_smallest_error() -> None:
    assert shared_decimals([Estimate(0.097, 0.0013), None, Estimate(0.0553, 0.00088)]) == 5
    assert shared_decimals([Estimate(1.0), Estimate(2.0, math.inf), None]) is None


def test_small_shares_as_percent() -> None:
    assert [error_percent_text(value) for value in (0.0031, 0.031, 0.314, 0.0)] == ["0.31", "3.1", "31", "0.00"]
