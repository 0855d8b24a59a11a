"""Copies of mapped tensors that leave nothing of the file in memory.

Pages of a mapped file that were touched count as memory of the process until something else needs them, so a program
that reads a large checkpoint through a mapping seems to grow to the size of the file.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

_CHUNK = 64 << 20
"""Bytes copied before their pages are given back."""
_MAPS = Path("/proc/self/maps")
_DONTNEED = 4
"""MADV_DONTNEED on Linux: pages of a mapped file are dropped and read again when they are touched."""


def private_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in memory of its own; if `tensor` lies in a mapped file, its pages are given back.

    Memory that is no file mapping is left alone: there the same advice would erase it.
    """
    if not tensor.is_contiguous() or tensor.numel() == 0:
        return tensor.clone(memory_format=torch.contiguous_format)
    copy = torch.empty_like(tensor)
    source, target = tensor.view(-1), copy.view(-1)
    is_mapped = sys.platform == "linux" and _is_mapped_file(tensor)
    step = max(1, _CHUNK // tensor.element_size())
    for start in range(0, len(source), step):
        part = source[start : start + step]
        target[start : start + step].copy_(part)
        if is_mapped:
            _give_back(part)
    return copy


def _is_mapped_file(tensor: Tensor) -> bool:
    """True if one mapping of a file, and of nothing else, holds the whole tensor."""
    first = tensor.data_ptr()
    last = first + tensor.numel() * tensor.element_size()
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no /proc: nothing is given back
        return False
    for line in lines:
        addresses, _access, _offset, _device, inode, *_name = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if begin <= first < end:
            return last <= end and inode != "0"
    return False


def _give_back(part: Tensor) -> None:
    """Drop the pages of a mapped file that `part` touches; pages shared with neighbours are read again when needed."""
    begin = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = part.data_ptr() + part.numel() * part.element_size() - begin
    # a refusal costs memory and nothing else
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _DONTNEED)
