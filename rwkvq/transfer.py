"""Block jobs for machines that do not see the run folder: their files travel through a store (rwkvq/store.py).

    objects/SHA256              checkpoint files, plan.json, activation files, under the hash of their content
    results/WORK_KEY            quantized tensors, under the hash of all that decides their bytes (block.work_key)
    uploads/RANDOM              what is on its way; older than a day = cut off

The sender calls `collect` (what the store holds of a block already), `send` for a block that lacks something, and
`collect` again when the job is done. The job is `run`, on any machine: it fetches, runs block.run as it is, and stores
every tensor as soon as it is there; so neither a killed worker nor a killed sender loses a finished tensor. After the
stage, `clean` removes plans, activations and results; checkpoints stay for the next run of the model, to be removed by
hand or by the rule of the bucket. Runs that share files may clean under each other: what is missing is sent again.

A worker keeps checkpoints in `cache_folder()`, proved by their hash (remembered: rwkvq/hashes.py), and everything else
only while the job runs; what a killed job left there is removed by the next one.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock, Timeout

from rwkvq.calibration import activations
from rwkvq.calibration.cache import REMEDY, CacheReader, CacheWriter
from rwkvq.calibration.gradients import gradients_path
from rwkvq.checkpoint.storage import open_storage
from rwkvq.errors import ActivationError, RwkvqError, StoredObjectError
from rwkvq.files import atomic_path, canonical_json, code_version, make_folder, sha256_of_bytes
from rwkvq.hashes import cache_file
from rwkvq.plan.plan import Plan
from rwkvq.quantize import block
from rwkvq.quantize.block import BlockJob, OnEvent
from rwkvq.quantize.results import read_done
from rwkvq.settings import Device
from rwkvq.store import Store, StoredFile

_PLAN = "plan.json"
_FIRST = "block-000.parquet"
_FIRST_ROWS = "input of block 0"
_V_FIRST = "v_first.parquet"


@dataclass(frozen=True, slots=True)
class RemoteJob:
    """A block job without a path of the machine that sent it.

    store: URL. checkpoint: the file, or all files of the folder of shards (is_folder). plan, inputs: files of the job.
    results: work key by name of the tensor. device: where it computes. code: version that the sender expects.
    """

    store: str
    checkpoint: tuple[StoredFile, ...]
    is_folder: bool
    plan: StoredFile
    inputs: tuple[StoredFile, ...]
    results: Mapping[str, str]
    block: int | None
    device: Device
    code: str

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RemoteJob:
        """The job whose `asdict` went through JSON."""
        files = {name: tuple(StoredFile(**item) for item in values[name]) for name in ("checkpoint", "inputs")}
        return cls(**{**values, **files, "plan": StoredFile(**values["plan"])})

    @property
    def checkpoint_key(self) -> str:
        """Names the checkpoint: its files and their names."""
        return sha256_of_bytes(canonical_json([asdict(file) for file in self.checkpoint]).encode())


def collect(store: Store, job: BlockJob) -> list[str]:
    """Bring the results that the store holds into the run folder; return the tensors that are still missing.

    Every result is proved by its key and digest before it appears in the folder; a damaged one is removed from the
    store and counts as missing. Raises StoreError, OutputError, and PlanError or ActivationError for the job's files.
    """
    return _fetch_results(store, job.folder, _work_keys(job))


def send(store: Store, job: BlockJob) -> RemoteJob:
    """Store the files of a job that are not there yet, and return the job for any machine.

    Raises StoreError, and CheckpointError, PlanError or ActivationError if a file of the job cannot be read.
    """
    checkpoint = Path(job.checkpoint)
    with TemporaryDirectory() as scratch:
        inputs = _inputs(job, Path(scratch))
        sent = {name: StoredFile.of(path, name) for name, path in (_files_of(checkpoint) | inputs).items()}
        for name, path in (_files_of(checkpoint) | inputs).items():
            store.send(path, sent[name])
    return RemoteJob(
        store=store.url,
        checkpoint=tuple(sent[name] for name in _files_of(checkpoint)),
        is_folder=checkpoint.is_dir(),
        plan=sent[_PLAN],
        inputs=tuple(sent[name] for name in inputs if name != _PLAN),
        results=_work_keys(job),
        block=job.block,
        device=job.device,
        code=code_version(block.CODE),
    )


def clean(store: Store, jobs: Iterable[BlockJob]) -> None:
    """Remove what these jobs needed and made, except checkpoints, and uploads that were cut off. Raises StoreError."""
    for job in jobs:
        with TemporaryDirectory() as scratch:
            inputs = [StoredFile.of(path, name) for name, path in _inputs(job, Path(scratch)).items()]
        store.remove(file.key for file in inputs)
        store.remove(_result(key) for key in _work_keys(job).values())
    store.remove_leftovers()


def run(job: Mapping[str, Any], on_event: OnEvent) -> list[str]:
    """Quantize the block of a RemoteJob (as JSON); return the tensors that were computed, which the store then holds.

    Sends the events of block.run. Raises what block.run raises, StoreError, StoredObjectError for a file that has to be
    sent again, and RwkvqError if this machine has another version of the program.
    """
    remote = RemoteJob.from_json(job)
    if remote.code != code_version(block.CODE):
        raise RwkvqError(f"{os.uname().nodename}: rwkvq differs from the sender's; install the same version there")
    store = Store(remote.store)
    with _job_folder() as folder:
        local = BlockJob(
            str(_checkpoint(store, remote)),
            str(_fetched(store, remote.plan, folder)),
            str(folder / "activations"),
            str(folder / "quantized"),
            remote.block,
            str(folder / "activations"),
            remote.device,
        )
        for file in remote.inputs:
            _fetched(store, file, folder / "activations")
        missing = {name: remote.results[name] for name in _fetch_results(store, local.folder, remote.results)}

        def store_finished() -> None:
            for name in [name for name in missing if _result_path(local.folder, name).is_file()]:
                store.put(_result_path(local.folder, name), _result(missing.pop(name)))

        def show(event: dict[str, Any]) -> None:
            store_finished()
            on_event(event)

        computed = block.run(asdict(local), show)
        store_finished()
        return computed


def cache_folder() -> Path:
    """Where this machine keeps checkpoints and running jobs: beside the remembered hashes."""
    return cache_file().parent


def _result(key: str) -> str:
    return f"results/{key}"


def _result_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _work_keys(job: BlockJob) -> dict[str, str]:
    """Work key by name of every planned tensor of the block."""
    return block.work_keys(job, Plan.read(Path(job.plan)))


def _fetch_results(store: Store, folder: Path, keys: Mapping[str, str]) -> list[str]:
    """Have the results in `folder` that the store holds; return the names of the others."""
    missing = []
    for name, key in keys.items():
        path = _result_path(folder, name)
        if read_done(path, key) is not None:
            continue
        try:
            if store.size(_result(key)) is None:
                raise StoredObjectError(key)
            store.get(_result(key), path, lambda found, key=key: read_done(found, key) is not None)  # type: ignore[misc]
        except StoredObjectError:
            missing.append(name)
    return missing


def _files_of(checkpoint: Path) -> dict[str, Path]:
    """The files of a checkpoint by name: one file, or shards and their index."""
    if checkpoint.is_file():
        return {checkpoint.name: checkpoint}
    files = {*open_storage(checkpoint).files, *checkpoint.glob("*.safetensors.index.json")}
    return {file.name: file for file in sorted(files)}


def _inputs(job: BlockJob, scratch: Path) -> dict[str, Path]:
    """The plan, the activation files and the gradients that the job reads, by name.

    What has to be made for it is put in `scratch`.
    """
    files, folder = {_PLAN: Path(job.plan)}, Path(job.activations)
    entries = block.planned_for(Plan.read(Path(job.plan)), job.block)
    if any(map(block.reads_gradients, entries)):
        gradients = gradients_path(Path(job.gradients), job.block)
        files[gradients.name] = gradients
    if job.block is None or not any(map(block.reads_activations, entries)):
        return files
    own = activations.block_path(folder, job.block)
    for path in (folder / _FIRST, own):
        if not path.is_file():
            raise ActivationError(f"{path}: no such file; {REMEDY}")
    if job.block != 0:
        files[_FIRST] = _key_only(folder / _FIRST, scratch / _FIRST)
    files[own.name] = own
    if job.block and (folder / _V_FIRST).is_file():
        files[_V_FIRST] = folder / _V_FIRST
    return files


def _key_only(first: Path, target: Path) -> Path:
    """Write the input of block 0 with one token of zeros a window: other blocks read only the windows' key from it."""
    with CacheReader(first, _FIRST_ROWS) as reader:
        key, shape = reader.key, replace(reader.shape, length=1)
    with atomic_path(target) as temporary, CacheWriter(temporary, _FIRST_ROWS, key, shape, "float16") as writer:
        writer.add(torch.zeros(shape.windows, 1, shape.width))
    return target


@contextmanager
def _job_folder() -> Iterator[Path]:
    """An empty folder that this job alone uses; it is removed when the job ends.

    A lock dies with its process, so the first folder whose lock is free is nobody's, whatever a killed job left there.
    """
    jobs = make_folder(cache_folder() / "jobs")
    for number in itertools.count():
        try:
            with FileLock(jobs / f"{number}.lock", timeout=0):
                folder = jobs / str(number)
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    yield make_folder(folder)
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return
        except Timeout:
            continue


def _checkpoint(store: Store, job: RemoteJob) -> Path:
    """Path of the job's checkpoint on this machine, fetched by one job while the others wait for it."""
    folder = make_folder(cache_folder() / "checkpoints" / job.checkpoint_key)
    with FileLock(folder.with_suffix(".lock")):
        for file in job.checkpoint:
            _fetched(store, file, folder)
    return folder if job.is_folder else folder / job.checkpoint[0].name


def _fetched(store: Store, file: StoredFile, folder: Path) -> Path:
    """Path of a sent file, fetched into `folder`."""
    store.fetch(file, folder / file.name)
    return folder / file.name
