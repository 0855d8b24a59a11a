"""Torch threads. Batches run side by side on Python threads, each with single-threaded torch: splitting one operation
over cores costs a barrier each, many times the work itself when cores are busy, and an operation that always runs on
one thread gives the same bits for any number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch to `count` threads, for Python threads started inside too, and back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def single_threaded_torch() -> AbstractContextManager[None]:
    """Set torch to one thread, for Python threads started inside too, and back."""
    return torch_threads(1)


def prefetched(items: Iterable[_Item], ahead: int = 2) -> Iterator[_Item]:
    """The items, `ahead` of them taken beforehand on a thread of their own."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[Any]] = deque(pool.submit(next, iterator, end) for _ in range(ahead))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, iterator, end))
            yield item


def map_in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int, *, ahead: int = 1
) -> Iterator[_Result]:
    """function(item) for each item, in order, `workers` at once and never more than workers + ahead of them begun."""
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= workers + ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
