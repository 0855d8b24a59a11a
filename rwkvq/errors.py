"""Every error that a user can cause. A message is one line: where, what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Sequence


class RwkvqError(Exception):
    """Base of all errors that are reported to the user as one line."""


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
