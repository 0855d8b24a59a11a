"""The last step of `quantize`: the finished artifact and its report, in one rename, where the user asked for them."""

from __future__ import annotations

import shutil
from pathlib import Path

from rwkvq.artifact.sums import files_of, write_sums
from rwkvq.artifact.writer import check_replaceable
from rwkvq.errors import ArtifactError, OutputError
from rwkvq.files import atomic_folder, check_can_create
from rwkvq.run import Run


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError now if `publish` would have to refuse `out` after all the work."""
    if not out.name:
        raise OutputError(f"{out}: is no name for a new folder; choose one")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: already exists; choose another folder or pass --overwrite")
    check_replaceable(out)
    check_can_create(out)


def publish(run: Run, out: Path, *, overwrite: bool) -> None:
    """Copy the run's artifact, its report and its metrics to `out`, with the checksums of all of them.

    Raises OutputError if `out` exists (without `overwrite`), is no artifact or cannot be written, and ArtifactError for
    links in the place of files, which are never followed; `out` is as it was then.
    """
    check_replaceable(out)
    files = {path.name: path for path in (*files_of(run.artifact), run.report, run.metrics) if path.is_file()}
    with atomic_folder(out, overwrite=overwrite) as folder:
        for name, path in sorted(files.items()):
            if path.is_symlink():
                raise ArtifactError(f"{path}: a link, expected the file itself; remove it and run the stages again")
            shutil.copyfile(path, folder / name)
        write_sums(folder)
