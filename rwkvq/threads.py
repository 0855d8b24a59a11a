"""Torch threads. Batches run side by side on Python threads, each with single-threaded torch: splitting one operation
over cores costs a barrier each, many times the work itself when cores are busy, and an operation that always runs on
one thread gives the same bits for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Set torch to one thread, for Python threads started inside too, and back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
