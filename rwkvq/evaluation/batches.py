"""Batches of an evaluation side by side: one Python thread each, and torch with a single thread in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from rwkvq.engine.model import Engine
from rwkvq.threads import single_threaded_torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_batches(
    function: Callable[[Item], Result], items: Sequence[Item], engines: Sequence[Engine]
) -> Iterator[Result]:
    """Yield function(item) for every item, in order, on as many threads as torch is set to use.

    Engines that keep no blocks would decode one block a thread, so they get one batch at a time.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not all(engine.resident for engine in engines):
        yield from map(function, items)
        return
    with single_threaded_torch(), ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C only what already runs is waited for
