"""Outputs of earlier stages that were damaged afterwards: found by what their manifest says of them, built again.

What is built again must have the bytes that were there before, so nothing that was made from it is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from rwkvq.artifact.manifest import read_manifest
from rwkvq.calibration import activations, windows
from rwkvq.device import working_on
from rwkvq.errors import ActivationError
from rwkvq.files import Progress, no_progress, sha256_of_file
from rwkvq.run import Run
from rwkvq.threads import single_threaded_torch

log = logging.getLogger("rwkvq.stages")

READ_BY = {
    "activations": ("windows",),
    "gradients": ("windows",),
    "curves": ("gradients",),
    "plan": ("proxies", "curves"),
    "quantize": ("gradients",),
    "distill": ("windows",),
    "pack": ("windows", "distill"),
    "report": ("proxies", "distill", "evaluate"),
}
"""Earlier stages whose small outputs a stage reads. Not `plan`: an edited plan is the user's decision."""
_Result = TypeVar("_Result")


def build_activations(run: Run, progress: Progress) -> None:
    """Write the activation cache of `run`; files that are there and valid stay. See write_activations."""
    layers = run.checkpoint.spec.layers
    with single_threaded_torch(), working_on(run.settings.run.device) as device:
        activations.write_activations(
            run.checkpoint,
            windows.read_windows(run.windows),
            run.activations,
            run.settings.activations,
            workers=run.processor_workers,
            device=device,
            on_block=lambda index: progress(f"activations of block {index}", index + 1, layers),
        )


def healed(run: Run, work: Callable[[], _Result]) -> _Result:
    """`work()`, and if the activation cache fails it, once more after the cache was healed."""
    try:
        return work()
    except ActivationError:
        heal_activations(run)
        return work()


def heal_activations(run: Run) -> list[Path]:
    """Build the damaged files of the activation cache again, each from the one before it; return them.

    Any thread or process may call it: the others wait, and find nothing left to do. Raises ActivationError if the cache
    cannot come out as it was: its manifest is unreadable, or checkpoint or windows are others by now.
    """
    folder = run.folder_of("activations")
    with FileLock(folder / "manifests" / ".activations.lock"):
        run = Run(run.settings)  # the checkpoint as it is now
        damaged = damaged_outputs(run, "activations")
        _check_origin(run)
        for path in damaged:
            log.warning("%s: damaged, no longer what stage activations wrote; building it again", path)
            path.unlink(missing_ok=True)  # also what only its hash tells
        if damaged:
            build_activations(run, no_progress)
            if left := damaged_outputs(run, "activations"):
                raise ActivationError(f"{left[0]}: built again with other bytes; run the activations stage again")
    return damaged


def _check_origin(run: Run) -> None:
    """Raise ActivationError unless the cache would be built from what it was built from."""
    manifest = read_manifest(run.folder_of("activations"), "activations")
    if manifest is None:
        raise ActivationError(
            f"{run.activations}: damaged, and its manifest says nothing; run the activations stage again"
        )
    if not run.windows.is_file():
        raise ActivationError(f"{run.windows}: no such file, and the activation cache is damaged; run again")
    origins = {"checkpoint": run.checkpoint.identity(), run.windows.name: sha256_of_file(run.windows)}
    for name, now in origins.items():
        if manifest.inputs.get(name) != now:
            found = f"{run.activations}: cannot be built as it was, {name} has changed since it was built"
            raise ActivationError(f"{found}; run the activations stage again")


def damaged_outputs(run: Run, stage: str) -> list[Path]:
    """Outputs of a finished stage that are missing or hold other bytes than its manifest says, in order of name."""
    folder = run.folder_of(stage)
    manifest = read_manifest(folder, stage)
    expected = {} if manifest is None else {folder / name: output for name, output in manifest.outputs.items()}
    return [
        path
        for path, output in sorted(expected.items())
        if not path.is_file() or path.stat().st_size != output.size or sha256_of_file(path) != output.sha256
    ]


def heal_inputs(run: Run, stage: str, rebuild: Callable[[str], object]) -> None:
    """Call `rebuild(name)` for each earlier stage whose damaged output `stage` would read."""
    for name in READ_BY.get(stage, ()):
        if damaged := damaged_outputs(run, name):
            log.warning("%s: damaged, no longer what stage %s wrote; building it again", damaged[0], name)
            rebuild(name)
