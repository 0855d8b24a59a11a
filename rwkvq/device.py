"""Where tensors are computed: on the processor or on one CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rwkvq.errors import SettingsError
from rwkvq.settings import Device

CPU = torch.device("cpu")


def torch_device(name: Device) -> torch.device:
    """The torch device of run.device. Raises SettingsError if this machine or this torch has no CUDA device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("run.device", ["found cuda, but torch sees no CUDA device here; set run.device to cpu"])
    return torch.device(name)


@contextmanager
def working_on(name: Device) -> Iterator[torch.device]:
    """The device for one piece of work; what it took of a GPU's memory is free for other processes afterwards."""
    device = torch_device(name)
    try:
        yield device
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
