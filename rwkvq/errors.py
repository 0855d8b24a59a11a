"""Every error that a user can cause. A message is one line: where, what was found, what was expected, what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

MAX_MESSAGE = 4000
"""Characters of a message that are shown; names and values from a file may be of any length."""
_BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that would break the line, drive the terminal or have no encoding."""


class RwkvqError(Exception):
    """Base of all errors that are reported to the user as one line, whatever the names and values in it hold."""

    def __str__(self) -> str:
        """The message as one line of at most MAX_MESSAGE characters."""
        text = _BREAKS.sub(lambda found: repr(found.group())[1:-1], super().__str__())
        return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 300]} ... {text[-290:]}"


class SettingsError(RwkvqError):
    """Settings cannot be used; `problems` lists every reason."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__(f"{source} is not usable: " + "; ".join(self.problems))

    def __reduce__(self) -> tuple[type[SettingsError], tuple[str, tuple[str, ...]]]:
        # errors cross process borders; the default would call __init__ with the message alone
        return SettingsError, (self.source, self.problems)


class CheckpointError(RwkvqError):
    """A checkpoint cannot be read, is not RWKV-6 or RWKV-7, or holds tensors of the wrong shape or value."""


class TokenizerError(RwkvqError):
    """A tokenizer file cannot be read or does not fit the model."""


class TextError(RwkvqError):
    """A text source cannot be read or holds too few tokens."""


class ShapeError(RwkvqError):
    """A tensor does not have the shape that a format or quantizer needs."""


class ActivationError(RwkvqError):
    """The activation cache is missing, damaged, or belongs to another model or other windows."""


class PlanError(RwkvqError):
    """A plan cannot be read, does not fit the model, or names something unknown."""


class QuantizationError(RwkvqError):
    """A tensor could not be quantized (a Hessian that is not positive definite, a loss that is not finite)."""


class ArtifactError(RwkvqError):
    """An artifact is missing, incomplete or damaged."""


class EvaluationError(RwkvqError):
    """An evaluation cannot run on what it was given."""


class OutputError(RwkvqError):
    """An output cannot be written: it exists, the folder is read-only, the disk is full, another run holds it."""


class OutOfMemory(RwkvqError):
    """An allocation was refused; the same work may succeed beside less other work."""


_REFUSED_ALLOCATION = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")
"""What torch and safetensors say in errors of their own."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a refused allocation is behind `error`: readers take it for a damaged file and say so."""
    while error is not None:
        if isinstance(error, MemoryError | OutOfMemory):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if any(words in str(error).lower() for words in _REFUSED_ALLOCATION):
            return True
        error = error.__cause__ or error.__context__
    return False


class StoreError(RwkvqError):
    """The store of `run.store` cannot be used or does not answer; the same work may succeed later."""


class StoredObjectError(StoreError):
    """A file is missing in the store, or is not what was stored; who sent it has to send it again."""


class FamilyError(RwkvqError):
    """Cells of a family failed; the others are done."""
