"""Numbers as text, the same in the terminal, in Markdown and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rwkvq.report.data import Estimate

NONE = "–"
"""Shown where there is no figure."""


def size_text(size: int | None) -> str:
    """Bytes in decimal units with three significant digits: `18.9 MB`."""
    if size is None:
        return NONE
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor * 0.9995:
            return f"{_three_digits(size / factor)} {unit}"
    return f"{size} B"


def count_text(count: int) -> str:
    """A count with three significant digits: `9.44 M`, `65.5 k`, `256`."""
    for unit, factor in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor * 0.9995:
            return f"{_three_digits(count / factor)} {unit}"
    return str(count)


def bits_text(bits: float | None) -> str:
    """Bits per weight with three decimals."""
    return NONE if bits is None else f"{bits:.3f}"


def seconds_text(seconds: float) -> str:
    """A duration: `< 0.1 s`, `0.4 s`, `42 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 0.05:
        return "< 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 6000:
        return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent_text(share: float | None) -> str:
    """A share 0 .. 1 as percent with one decimal."""
    return NONE if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def error_percent_text(share: float | None) -> str:
    """A small share as percent with two significant digits and no unit: `0.31`, `3.1`, `31`."""
    if share is None or not math.isfinite(share):
        return NONE
    return _significant(100 * share, 2)


def number_text(value: float | None) -> str:
    """A number with four significant digits, never in exponent form; a dash for none, `not finite` for Inf and NaN."""
    if value is None:
        return NONE
    return _significant(value, 4) if math.isfinite(value) else "not finite"


def shared_decimals(estimates: Iterable[Estimate | None], *, factor: float = 1.0) -> int | None:
    """Decimals that show two significant digits of the smallest error; None if there is no error to go by."""
    errors = [item.error * factor for item in estimates if item is not None and item.error is not None]
    usable = [error for error in errors if math.isfinite(error) and error > 0]
    return _decimals(min(usable), 2) if usable else None


def estimate_text(estimate: Estimate | None, *, factor: float = 1.0, decimals: int | None = None) -> str:
    """`value ± standard error`, both times `factor`; without `decimals`, two significant digits of the error."""
    if estimate is None:
        return NONE
    value = estimate.value * factor
    decimals = shared_decimals([estimate], factor=factor) if decimals is None else decimals
    if decimals is None or not math.isfinite(value):
        return number_text(value)
    if estimate.error is None or not math.isfinite(estimate.error):
        return f"{value:,.{decimals}f}"
    return f"{value:,.{decimals}f} ± {estimate.error * factor:,.{decimals}f}"


def _decimals(value: float, digits: int) -> int:
    """Decimals that show `digits` significant digits of `value`; 0 .. 8."""
    if value <= 0:
        return digits
    return min(8, max(0, digits - 1 - math.floor(math.log10(value))))


def _significant(value: float, digits: int) -> str:
    return f"{value:,.{_decimals(abs(value), digits)}f}"


def _three_digits(value: float) -> str:
    """1 <= value < 1000 as `9.44`, `18.9`, `256`."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
