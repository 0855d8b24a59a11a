"""Proof, before torch loads it, that a pickle builds nothing but dictionaries of tensors: it is read, never run.

torch's own `weights_only` refuses foreign code, but calls what it allows with any argument, follows shared values into
sums that never end, and trusts sizes. The dialect accepted here is what torch.save writes of a state_dict.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from typing import Any

MAX_PICKLE_BYTES = 4 << 20
"""The pickle of the largest RWKV, without the tensors' bytes, takes some hundred kB."""
MAX_OPERATIONS = 300_000
"""About forty a tensor."""
NO_STATE_DICT = "not a pickle of plain tensors; nothing was run"
LEGACY_PICKLES = 5
"""A legacy file starts with a magic number, a protocol, the writer's sizes, the values and the keys of storages."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_MARK, _TEXT, _PLAIN, _EMPTY, _TUPLE, _LIST, _DICT, _STORAGE, _TENSOR, _KIND, _ORDERED, _REBUILD = range(12)
_PUSHED = {
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING"), _TEXT),
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _PLAIN),
    **{"EMPTY_TUPLE": _EMPTY, "EMPTY_LIST": _LIST, "EMPTY_DICT": _DICT, "MARK": _MARK},
}
_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "STOP")
_FUNCTIONS = {
    "collections OrderedDict": _ORDERED,
    "torch._utils _rebuild_tensor_v2": _REBUILD,
    "torch._utils _rebuild_tensor_v3": _REBUILD,
    "torch._utils _rebuild_parameter": _REBUILD,
    "torch._utils _rebuild_meta_tensor_no_storage": _REBUILD,
    "torch.storage UntypedStorage": _KIND,
}
_KINDS = re.compile(r"torch ([A-Z][A-Za-z0-9]*Storage|(b?float|u?int|complex|bool|q?u?int)[0-9a-z_]*)")
_ONCE = (_TUPLE, _LIST, _DICT)
"""What may not be taken from the memo again: shared containers can stand for more than any memory holds."""


class ForeignCodeError(ValueError):
    """The pickle names something that no state_dict needs; the message is its name."""


def check_pickle(data: bytes) -> None:
    """Raise ValueError unless `data` starts with one pickle of the accepted dialect; nothing is built or called."""
    _Reader(io.BytesIO(data)).read()


def check_legacy(data: bytes, size: int) -> None:
    """Raise ValueError unless `data`, the start of a file of `size` bytes, is of torch.save's format before 2020.

    In that format torch allocates as many values as the pickle claims before it looks for them in the file.
    """
    file = io.BytesIO(data)
    first = _Reader(file)
    first.read()
    if first.last != _LEGACY_MAGIC:
        raise ValueError(NO_STATE_DICT)
    for _ in range(LEGACY_PICKLES - 1):
        _Reader(file, largest=size).read()


class _Reader:
    """Follows one pickle with the kinds of its values in place of the values."""

    def __init__(self, file: io.BytesIO, largest: float = math.inf) -> None:
        """largest: no number may be larger."""
        self._file = file
        self._largest = largest
        self._stack: list[int] = []
        self._memo: dict[int, int] = {}
        self.last: Any = None

    def read(self) -> None:
        """Follow the pickle to its end."""
        try:
            for count, (operation, argument, _) in enumerate(pickletools.genops(self._file)):
                if count > MAX_OPERATIONS:
                    raise ValueError(f"a pickle of more than {MAX_OPERATIONS} operations, which no model needs")
                self._step(operation.name, argument)
                self.last = self.last if operation.name == "STOP" else argument
            _require(len(self._stack) == 1 and self._stack[0] != _MARK)
        except (IndexError, KeyError) as error:
            raise ValueError(NO_STATE_DICT) from error

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUSHED:
            _require(not isinstance(argument, int) or argument <= self._largest)
            stack.append(_PUSHED[name])
        elif name == "GLOBAL":
            stack.append(_named(argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            _require(self._memo[argument] not in _ONCE)
            stack.append(self._memo[argument])
        elif name == "TUPLE" or name in _SIZES:
            self._taken(_SIZES.get(name))
            stack.append(_TUPLE)
        elif name in ("APPEND", "APPENDS"):
            self._taken(1 if name == "APPEND" else None)
            _require(stack[-1] == _LIST)
        elif name in ("SETITEM", "SETITEMS"):
            keys = self._taken(2 if name == "SETITEM" else None)[::2]
            # a tuple as key could take for ever to hash
            _require(stack[-1] == _DICT and all(key in (_TEXT, _PLAIN) for key in keys))
        elif name in ("REDUCE", "BUILD", "BINPERSID"):
            self._made(name)
        else:
            _require(name in _IGNORED)

    def _made(self, name: str) -> None:
        """A call, the attributes of a dictionary, or a storage."""
        argument = self._taken(1)[0]
        if name == "BINPERSID":
            _require(argument == _TUPLE)
            self._stack.append(_STORAGE)
        elif name == "BUILD":
            _require(argument == _DICT and self._stack[-1] == _DICT)
        else:
            call = self._taken(1)[0], argument
            _require(call in ((_ORDERED, _EMPTY), (_REBUILD, _TUPLE)))
            self._stack.append(_DICT if argument == _EMPTY else _TENSOR)

    def _taken(self, count: int | None) -> list[int]:
        """Remove `count` values, or all above the last mark and the mark, from the stack."""
        stack = self._stack
        at = (
            len(stack) - 1 - stack[::-1].index(_MARK) if count is None and _MARK in stack else len(stack) - (count or 0)
        )
        _require(at >= 0 and (count is not None or _MARK in stack))
        values = stack[at:] if count is not None else stack[at + 1 :]
        _require(_MARK not in values)
        del stack[at:]
        return values


def _named(name: str) -> int:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if _KINDS.fullmatch(name):
        return _KIND
    raise ForeignCodeError(name.replace(" ", "."))


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError(NO_STATE_DICT)
