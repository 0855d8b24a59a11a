"""Random damage to bytes, for tests that read what comes out, and the one thing that may happen then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from rwkvq.errors import RwkvqError

MAX_MESSAGE = 4100
NASTY = (
    b"\0" * 8,
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"PK\5\6",
    b"../../",
    b"\n",
    b"1e999",
    b"NaN",
    b"-1",
    b"[[[[",
    b"\xed\xa0\x80",
)


def edits(size: int) -> st.SearchStrategy[list[tuple[str, int, bytes]]]:
    """A few edits of a file of `size` bytes: overwrite, insert, delete, cut."""
    place = (
        st.integers(0, max(0, size - 1)) | st.integers(0, min(64, size - 1)) | st.integers(max(0, size - 200), size - 1)
    )
    data = st.binary(min_size=1, max_size=8) | st.sampled_from(NASTY)
    return st.lists(
        st.tuples(st.sampled_from(("set", "set", "insert", "delete", "cut")), place, data), min_size=1, max_size=3
    )


def damaged(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """`content` with the edits applied one after the other."""
    for kind, place, data in changes:
        rest = {"set": place + len(data), "insert": place, "delete": place + len(data), "cut": len(content)}[kind]
        content = content[:place] + (data if kind in ("set", "insert") else b"") + content[rest:]
    return content


def works_or_is_refused(read: Callable[[Path], object], path: Path, remains: Callable[[], bool] = lambda: True) -> bool:
    """True if reading works, False if it raises RwkvqError of one line; anything else is raised."""
    try:
        read(path)
    except RwkvqError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < MAX_MESSAGE
        return False
    return True


def few(examples: int) -> settings:
    """Hypothesis for the default suite: a few seconds, no shrinking of what takes long."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=checks,
        database=None,
        phases=(Phase.generate, Phase.shrink),
    )


def many(examples: int) -> settings:
    """Hypothesis for the slow suite: other examples at every run."""
    return settings(few(examples), derandomize=False)
