"""Block jobs through a store: the bytes of the same job here, whatever is damaged, killed or found on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rwkvq import transfer
from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.errors import ActivationError, RwkvqError, StoredObjectError
from rwkvq.quantize import block
from rwkvq.quantize.block import BlockJob
from rwkvq.run import Run
from rwkvq.stages import block_jobs, run_stage
from rwkvq.store import Store
from rwkvq.transfer import RemoteJob
from tests.small import settings_of, tree_hash, write_inputs
from tests.tiny import write_tensors

BEFORE = ("windows", "activations", "proxies", "plan")


@dataclass(frozen=True)
class Prepared:
    """A run before stage `quantize`, and the hashes of what that stage writes."""

    folder: Path
    jobs: list[BlockJob]
    expected: dict[str, str]


def prepare(folder: Path, model: Path | None = None) -> Prepared:
    values = write_inputs(folder) | {"plan": {"policy": "sq"}} | ({"model": str(model)} if model else {})
    run = Run(settings_of(values))
    for stage in BEFORE:
        run_stage(run, stage)
    jobs = block_jobs(run)
    for job in jobs:
        block.run(asdict(job), ignore)
    return Prepared(folder, jobs, tree_hash(run.quantized))


def ignore(event: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("sender"))


@pytest.fixture
def jobs(prepared: Prepared, tmp_path: Path) -> list[BlockJob]:
    """The jobs of a sender without results."""
    return [replace(job, out_dir=str(tmp_path / "quantized")) for job in prepared.jobs]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store")


@pytest.fixture(autouse=True)
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder of the machine that works."""
    monkeypatch.setenv("RWKVQ_CACHE", str(tmp_path / "worker"))
    yield tmp_path / "worker"
    fsspec.filesystem("memory").store.clear()


def work(job: RemoteJob, on_event: Any = ignore) -> list[str]:
    """Run a job as it arrives: through JSON."""
    return transfer.run(json.loads(json.dumps(asdict(job))), on_event)


def keys(store: Store, folder: str) -> list[str]:
    """What the store holds in a folder."""
    path = Path(store._root) / folder
    return sorted(item.name for item in path.iterdir()) if path.is_dir() else []


@pytest.mark.parametrize("url", ["memory://bucket/prefix", "file://{}/store"])
def test_the_bytes_are_those_of_the_job_without_a_store(
    prepared: Prepared, jobs: list[BlockJob], tmp_path: Path, url: str, worker: Path
) -> None:
    store = Store(url.format(tmp_path))
    for job in jobs:
        assert transfer.collect(store, job) != []
        events: list[dict[str, Any]] = []
        computed = work(transfer.send(store, job), events.append)
        assert len(computed) == len(events) == events[-1]["total"]
        assert transfer.collect(store, job) == []
    assert tree_hash(tmp_path / "quantized") == prepared.expected
    assert [path for path in (worker / "jobs").iterdir() if path.is_dir()] == []


def test_a_job_tells_nothing_of_the_senders_folders(prepared: Prepared, jobs: list[BlockJob], tmp_path: Path) -> None:
    store = Store("memory://bucket")
    for job in jobs:
        sent = json.dumps(asdict(transfer.send(store, job)))
        assert str(prepared.folder) not in sent and str(tmp_path) not in sent and str(Path.cwd()) not in sent


def test_a_file_that_jobs_share_is_sent_once(
    jobs: list[BlockJob], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda self, path, key: (sent.append(key), put(self, path, key)))
    remote = [transfer.send(store, job) for job in jobs]
    assert len(sent) == len(set(sent))
    assert all(job.checkpoint == remote[0].checkpoint and job.plan == remote[0].plan for job in remote)


def test_a_checkpoint_is_fetched_once_a_machine_and_proved(
    prepared: Prepared, jobs: list[BlockJob], store: Store, worker: Path, tmp_path: Path
) -> None:
    first, second = (transfer.send(store, job) for job in jobs[:2])
    work(first)
    [cached] = worker.glob("checkpoints/*/*.pth")
    store.remove([first.checkpoint[0].key])
    work(second)
    assert transfer.collect(store, jobs[1]) == []

    damaged = bytearray(cached.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    cached.write_bytes(damaged)
    store.remove([f"results/{key}" for key in second.results.values()])
    with pytest.raises(StoredObjectError):  # it is gone here, too
        work(second)
    work(transfer.send(store, replace(jobs[1], out_dir=str(tmp_path / "again"))))
    assert transfer.collect(store, replace(jobs[1], out_dir=str(tmp_path / "again"))) == []
    assert tree_hash(tmp_path / "again").items() <= prepared.expected.items()


def test_shards_travel_with_their_index(tmp_path: Path, prepared: Prepared, store: Store) -> None:
    source = open_checkpoint(Path(prepared.jobs[0].checkpoint))
    names = source.names()
    shards = {"a-00001-of-00002.safetensors": names[: len(names) // 2]}
    shards["a-00002-of-00002.safetensors"] = names[len(names) // 2 :]
    folder = tmp_path / "shards"
    for file, members in shards.items():
        write_tensors(folder / file, {name: source.tensor(name).clone() for name in members})
    index = {name: file for file, members in shards.items() for name in members}
    (folder / "a.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    sharded = prepare(tmp_path / "sender", folder)
    job = replace(sharded.jobs[0], out_dir=str(tmp_path / "quantized"))
    work(transfer.send(store, job))
    assert transfer.collect(store, job) == []
    assert tree_hash(tmp_path / "quantized").items() <= sharded.expected.items()


def test_a_killed_job_loses_no_tensor_that_was_finished(
    prepared: Prepared, jobs: list[BlockJob], store: Store, tmp_path: Path, worker: Path
) -> None:
    job = jobs[0]
    remote = transfer.send(store, job)

    class Killed(BaseException):
        """Stands for a signal."""

    def kill_after_two(event: dict[str, Any]) -> None:
        if event["done"] == 2:
            raise Killed

    with pytest.raises(Killed):
        work(remote, kill_after_two)
    assert len(keys(store, "results")) == 2
    before = len(remote.results)
    assert len(transfer.collect(store, job)) == before - 2  # a sender takes them, and so does another worker
    assert len(work(remote)) == before - 2
    assert transfer.collect(store, job) == []
    assert tree_hash(tmp_path / "quantized").items() <= prepared.expected.items()


def test_results_in_the_store_need_no_work(prepared: Prepared, jobs: list[BlockJob], store: Store) -> None:
    remote = transfer.send(store, jobs[0])
    work(remote)
    assert work(remote) == []  # the sender was killed before it collected, and sends again
    assert transfer.collect(store, jobs[0]) == []


@pytest.mark.parametrize("how", ["truncated", "altered", "of other work"])
def test_a_damaged_result_is_found_and_made_again(
    prepared: Prepared, jobs: list[BlockJob], store: Store, how: str, tmp_path: Path
) -> None:
    remote = transfer.send(store, jobs[0])
    work(remote)
    name, key = next(iter(remote.results.items()))
    path = Path(store._root) / "results" / key
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-8])
    elif how == "altered":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.write_bytes((path.parent / list(remote.results.values())[1]).read_bytes())
    assert transfer.collect(store, jobs[0]) == [name]
    assert not (tmp_path / "quantized" / "block-000" / f"{name}.safetensors").exists()
    assert key not in keys(store, "results")
    assert work(remote) == [name]
    assert transfer.collect(store, jobs[0]) == []
    assert tree_hash(tmp_path / "quantized").items() <= prepared.expected.items()


@pytest.mark.parametrize("what", ["plan", "inputs", "checkpoint"])
def test_a_damaged_input_is_found_removed_and_sent_again(
    prepared: Prepared, jobs: list[BlockJob], store: Store, tmp_path: Path, what: str
) -> None:
    remote = transfer.send(store, jobs[1])
    files = {"plan": remote.plan, "inputs": remote.inputs[-1], "checkpoint": remote.checkpoint[0]}
    path = Path(store._root) / files[what].key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # of the right size, so that only the hash tells
    path.write_bytes(data)
    with pytest.raises(StoredObjectError, match="damaged, and removed"):
        work(remote)
    work(transfer.send(store, jobs[1]))
    assert transfer.collect(store, jobs[1]) == []
    assert tree_hash(tmp_path / "quantized").items() <= prepared.expected.items()


def test_clean_leaves_the_checkpoint_alone(jobs: list[BlockJob], store: Store) -> None:
    remote = [transfer.send(store, job) for job in jobs]
    for job in remote:
        work(job)
    transfer.clean(store, jobs)
    assert keys(store, "objects") == [remote[0].checkpoint[0].sha256]
    assert keys(store, "results") == keys(store, "uploads") == []


def test_another_version_of_the_program_is_refused(jobs: list[BlockJob], store: Store) -> None:
    with pytest.raises(RwkvqError, match="differs from the sender's; install the same version there"):
        work(replace(transfer.send(store, jobs[0]), code="0" * 64))


def test_what_a_killed_job_left_on_the_worker_is_removed(jobs: list[BlockJob], store: Store, worker: Path) -> None:
    (worker / "jobs" / "0" / "activations").mkdir(parents=True)
    (worker / "jobs" / "0" / "activations" / "block-000.parquet").write_text("of another model")
    work(transfer.send(store, jobs[1]))
    assert [path for path in (worker / "jobs").iterdir() if path.is_dir()] == []


def test_other_blocks_get_the_key_of_block_0_without_its_values(jobs: list[BlockJob], store: Store) -> None:
    whole, key_only = (
        {file.name: file.size for file in transfer.send(store, job).inputs}["block-000.parquet"] for job in jobs[:2]
    )
    assert key_only < whole


@pytest.mark.parametrize("name", ["block-000.parquet", "block-001.parquet"])
def test_no_such_activations_is_the_error_that_the_flow_heals(
    jobs: list[BlockJob], store: Store, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "activations"
    shutil.copytree(jobs[1].activations, folder)
    (folder / name).unlink()
    with pytest.raises(ActivationError, match=f"{name}: no such file"):
        transfer.send(store, replace(jobs[1], activations=str(folder)))
