"""Where the inputs of one weight's block, and the gradients of its output, come from when it is quantized again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rwkvq.calibration.activations import block_path, cache_windows, write_activations
from rwkvq.calibration.gradients import gradients_path, write_gradients
from rwkvq.calibration.windows import Windows
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.device import working_on
from rwkvq.errors import ArtifactError
from rwkvq.files import Progress
from rwkvq.plan.plan import PlannedTensor
from rwkvq.quantize import block
from rwkvq.run import cores
from rwkvq.settings import Settings
from rwkvq.threads import single_threaded_torch


class _LastBlockReached(Exception):
    """Ends the computation of activations after the last block that is needed. Never leaves this module."""


@dataclass(frozen=True, slots=True)
class Cache:
    """A given cache of activations with the gradients beside it, or both computed from the windows."""

    given: Path | None
    entry: PlannedTensor
    source: Checkpoint
    windows: Windows
    settings: Settings

    @property
    def origin(self) -> str:
        """`computed`, `cache` or `not needed`."""
        if not (block.reads_activations(self.entry) or self.needs_gradients):
            return "not needed"
        return "computed" if self.given is None else "cache"

    @property
    def needs_gradients(self) -> bool:
        """Whether the weight's quantizer reads what stage `gradients` found."""
        return block.reads_gradients(self.entry)

    def fill(self, folder: Path, progress: Progress) -> Path:
        """The folder that holds the inputs; `folder` if they have to be computed.

        Raises ActivationError, and ArtifactError if the given cache was made from other windows.
        """
        if self.origin == "computed":
            self._compute(folder, progress)
        if self.origin != "cache" or self.given is None:
            return folder
        if cache_windows(self.given) != self.windows.identity():
            raise ArtifactError(
                f"{self.given}: activations of other windows than the artifact's; give its own run folder, or none "
                "and they are computed again"
            )
        return self.given

    def _compute(self, folder: Path, progress: Progress) -> None:
        """Inputs of blocks 0 to the weight's own, and of all blocks for gradients, which come from the model's end.

        Files that nothing reads any more are deleted on the way.
        """
        last = self.source.spec.layers - 1 if self.needs_gradients else self.entry.block or 0

        def reached(step: int) -> None:
            progress(f"activations of block {step}", step + 1, last + 1)
            if step > 1 and not self.needs_gradients:  # the file of block 0 names model and windows of the cache
                block_path(folder, step - 1).unlink()
            if step == last:
                raise _LastBlockReached

        settings = self.settings.activations
        with single_threaded_torch(), working_on(self.settings.run.device) as device, suppress(_LastBlockReached):
            write_activations(
                self.source, self.windows, folder, settings, workers=cores(), device=device, on_block=reached
            )

    def fill_gradients(self, inputs: Path, folder: Path, progress: Progress) -> Path:
        """The folder that holds the gradients of the weight's block; `folder` if they have to be computed.

        inputs: what `fill` returned. Raises ActivationError.
        """
        if not self.needs_gradients:
            return folder
        if self.given is not None and gradients_path(self.given.parent / "gradients", self.entry.block).is_file():
            return self.given.parent / "gradients"
        layers = self.source.spec.layers
        with single_threaded_torch(), working_on(self.settings.run.device) as device:
            write_gradients(
                self.source,
                self.windows,
                inputs,
                folder,
                count=self.settings.gradients.windows,
                seed=self.settings.seed,
                workers=cores(),
                device=device,
                on_block=lambda done: progress(f"gradients of block {done}", layers - done, layers),
            )
        return folder
