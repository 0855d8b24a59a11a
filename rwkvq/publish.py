"""The last step of the `quantize` command: the finished artifact with its report, in one rename, where the user asked for it."""

from __future__ import annotations

import shutil
from pathlib import Path

from rwkvq.artifact.sums import write_sums
from rwkvq.files import atomic_folder
from rwkvq.run import Run


def publish(run: Run, out: Path, *, overwrite: bool) -> None:
    """Copy the run's artifact, its report and its metrics to `out`, with the checksums of all of them.

    Raises OutputError if `out` exists (without `overwrite`) or cannot be written; then `out` is as it was.
    """
    extras = [path for path in (run.report, run.metrics) if path.is_file()]
    with atomic_folder(out, overwrite=overwrite) as folder:
        shutil.copytree(run.artifact, folder, dirs_exist_ok=True)
        for path in extras:
            shutil.copyfile(path, folder / path.name)
        write_sums(folder)
