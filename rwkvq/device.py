"""Where tensors are computed: on the processor or on one CUDA device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from rwkvq.errors import SettingsError
from rwkvq.settings import Device

CPU = torch.device("cpu")
_loading = threading.Lock()
STREAMS = 6
"""Weights that a GPU works on at once: the columns of one leave most of it idle."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def torch_device(name: Device) -> torch.device:
    """The torch device of run.device. Raises SettingsError if this machine or this torch has no CUDA device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("run.device", ["found cuda, but torch sees no CUDA device here; set run.device to cpu"])
    return torch.device(name)


@contextmanager
def working_on(name: Device) -> Iterator[torch.device]:
    """The device for one piece of work; what it took of a GPU's memory is free for other processes afterwards."""
    device = torch_device(name)
    if device.type == "cuda":
        with _loading:
            torch.linalg.inv(torch.ones(1, 1, device=device))  # loads libraries, which torch refuses to two threads
    try:
        yield device
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def map_on(device: torch.device, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """function(item) for each item, in order: one after the other on the processor, STREAMS at once on a GPU."""
    if device.type == "cpu":
        yield from map(function, items)
        return
    begun = torch.cuda.current_stream().record_event()

    def on_stream(item: _Item) -> _Result:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_event(begun)  # else it would not wait for what was begun before
        with torch.cuda.stream(stream):
            return function(item)

    with ThreadPoolExecutor(STREAMS) as pool:
        yield from pool.map(on_stream, items)
