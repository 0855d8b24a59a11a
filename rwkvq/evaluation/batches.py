"""Batches of an evaluation side by side: one Python thread each, and torch with a single thread in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from rwkvq.engine.model import Engine

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_batches(
    function: Callable[[Item], Result], items: Sequence[Item], engines: Sequence[Engine]
) -> Iterator[Result]:
    """Yield function(item) for every item, in order, on as many threads as torch is set to use.

    Splitting single operations over cores costs a barrier each, which takes many times the work itself when the cores
    are busy; batches need none. And an operation that always runs on one thread gives the same bits for any number of
    threads. Engines that keep no blocks would decode one block a thread, so they get one batch at a time.
    """
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2 or not all(engine.resident for engine in engines):
        yield from map(function, items)
        return
    with _single_threaded_torch(), ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C only what already runs is waited for


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Set torch to one thread, for threads started inside too, and back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
