"""Batches of an evaluation side by side: one Python thread each, and torch with a single thread in each.

Engines that keep their blocks run batch by batch through the whole model. Those that do not run many batches through
one block before the next is loaded, so that a model is read once for a group of batches and not once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from rwkvq.engine.model import Engine
from rwkvq.models import batches_at_once
from rwkvq.threads import single_threaded_torch

Item = TypeVar("Item")
Result = TypeVar("Result")

GROUP_BYTES = 256 << 20
"""Hidden states of all engines that wait in memory together, beside a block or all heads."""


def map_hidden(
    score: Callable[[Item, list[Tensor]], Result],
    items: Sequence[Item],
    ids_of: Callable[[Item], Tensor],
    engines: Sequence[Engine],
) -> Iterator[Result]:
    """Yield score(item, hidden states of every engine for ids_of(item)) for every item, in order.

    The results are the same bits for any number of threads, and whether the engines keep their blocks or not.
    """
    if all(engine.resident for engine in engines):
        yield from map_batches(
            lambda item: score(item, [engine.hidden(ids_of(item)) for engine in engines]), items, engines
        )
        return
    threads = torch.get_num_threads()
    with single_threaded_torch():
        for group in _groups(items, ids_of, engines):
            ids = [ids_of(item) for item in group]
            tokens = max(batch.numel() for batch in ids)
            workers = batches_at_once(engines[0].spec, tokens, threads)
            for engine in engines:
                engine.let_go()  # no head of the group before stays beside a block
            hidden = [engine.hidden_of(ids, workers) for engine in engines]
            for index, item in enumerate(group):
                yield score(item, [states[index] for states in hidden])


def _groups(
    items: Sequence[Item], ids_of: Callable[[Item], Tensor], engines: Sequence[Engine]
) -> Iterator[Sequence[Item]]:
    """Consecutive items, as many as their hidden states may take of memory, at least one."""
    # v_first of x070 waits beside the states of the engine that runs
    states = len(engines) + 1
    limit = GROUP_BYTES // (states * engines[0].spec.width * engines[0].dtype.itemsize)
    begin, tokens = 0, 0
    for index, item in enumerate(items):
        size = ids_of(item).numel()
        if index > begin and tokens + size > limit:
            yield items[begin:index]
            begin, tokens = index, 0
        tokens += size
    yield items[begin:]


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
