"""Small files that stand for gigabytes, read by a process that may take 512 MB more than it has: each is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rwkvq.artifact.sums import write_sums
from rwkvq.calibration.cache import CacheKey, CacheShape, CacheWriter
from rwkvq.calibration.windows import FORMAT
from rwkvq.proxies import table
from tests.hostile import legacy_claim, memory_bombs, write_safetensors, zip_with
from tests.packed import codes_of, plan_of, tiny_source, write_packed

ROOT = Path(__file__).resolve().parents[2]
MEGABYTES = 512
pytestmark = pytest.mark.slow


def bombs(folder: Path) -> Iterator[tuple[str, Path]]:
    """Reader and file of each; the files that start with `sound` are read, all others must be refused."""
    source = tiny_source(folder, "x060", layers=1, width=64, vocab=64)
    plan = plan_of(source)
    yield "model", source.path.rename(folder / "sound.safetensors")
    for number, program in enumerate(memory_bombs().values()):
        yield "model", zip_with(folder / f"pickle-{number}.pth", pickled=program or b"\0")
    for size in (33, 40, 62):
        yield "model", legacy_claim(folder / f"legacy-{size}.pth", 1 << size)
    entry = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    yield "model", write_safetensors(folder / "header.safetensors", {f"a{i}": entry for i in range(200_000)})
    yield "model", write_safetensors(folder / "names.safetensors", {f"a{i}": entry for i in range(60_000)})
    yield (
        "model",
        write_safetensors(folder / "metadata.safetensors", {"__metadata__": {str(i): "" for i in range(300_000)}}),
    )
    yield "model", sharded(folder / "index")
    for number, text in enumerate(json_texts(plan.to_json())):
        path = folder / f"plan-{number}.json"
        path.write_text(text)
        yield "plan", path
        artifact = folder / f"artifact-{number}"
        write_packed(artifact, tiny_source(folder, "x060", layers=1, width=64, vocab=64), plan, codes_of(plan))
        (artifact / "quantization.json").write_text(text)
        write_sums(artifact)
        yield "artifact", artifact
    for number, text in enumerate(yaml_texts()):
        path = folder / f"params-{number}.yaml"
        path.write_text(text)
        yield "yaml", path
    yield from parquet_files(folder)


def sharded(folder: Path) -> Path:
    folder.mkdir()
    places = ",".join(f'"{i}":"a.safetensors"' for i in range(500_000))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{places}}}}}')
    return folder


def json_texts(plan: dict[str, Any]) -> list[str]:
    """A plan whose rows are very many objects, lists, or one text of 15 MB, which all fit the limit on bytes."""
    start = json.dumps(plan).partition('"tensors": [')[0] + '"tensors": ['
    return [
        start + "{}," * 1_500_000 + "{}]}",
        start + "[[]]," * 400_000 + "0]}",
        start + '{"":0},' * 500_000 + "0]}",
        start + '{"name":"' + "x" * 15_000_000 + '"}]}',
        start + "1," * 1_000_000 + "0]}",
        "[" * 5_000_000,
    ]


def yaml_texts() -> list[str]:
    """Texts of almost 256 kB, and one of more."""
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return [
        "\n".join(laughs),
        "a: [" + "x," * 120_000 + "]",
        "- \n" * 80_000,
        "{" * 250_000,
        "a: " + "9" * 250_000,
        "a: &a " + "x" * 190_000 + "\nb: [" + "*a," * 19_900 + "]",
        "\n".join(f"k{i}: &k{i} v" for i in range(60_000)),
    ]


def parquet_files(folder: Path) -> Iterator[tuple[str, Path]]:
    length, count = 4096, 8200
    key, shape = CacheKey("a", "b", "c"), CacheShape(2, 8, 16, (), False)
    with CacheWriter(folder / "sound-cache.parquet", "input of block 0", key, shape, "float16") as writer:
        writer.add(torch.zeros(2, 8, 16))
    yield "cache", folder / "sound-cache.parquet"
    metadata = pq.read_schema(folder / "sound-cache.parquet").metadata
    for number, options in enumerate(({"compression": "zstd"}, {"compression": "none"})):
        ids = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(length * count, np.int32)), length)
        columns = {"window": pa.array(np.arange(count, dtype=np.int32)), "offset": pa.array(np.zeros(count, np.int64))}
        columns |= {"held_out": pa.array(np.zeros(count, bool)), "source": pa.array(["a"] * count)}
        columns |= {"sha256": pa.array(["a" * 64] * count), "ids": ids}
        names = {"format": FORMAT, "source": "a", "tokenizer_sha256": "a", "text_sha256": "a", "seed": "0"}
        path = folder / f"windows-{number}.parquet"
        pq.write_table(pa.table(columns).replace_schema_metadata(names), path, **options)
        yield "windows", path
        x = pa.array([bytes(2 * 8192)] * (length * 1024 // 8192), pa.binary(2 * 8192))
        rows = {
            "window": pa.array(np.zeros(len(x), np.int32)),
            "position": pa.array(np.arange(len(x), dtype=np.int32)),
            "x": x,
        }
        fields = [pa.field(name, column.type, nullable=False) for name, column in rows.items()]
        schema = pa.schema(fields, metadata=metadata | {b"windows": b"1"})
        path = folder / f"cache-{number}.parquet"
        pq.write_table(pa.Table.from_arrays(list(rows.values()), schema=schema), path, row_group_size=len(x), **options)
        yield "cache", path
    yield from proxies_files(folder)


def proxies_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """A text of 1 MB in every row by reference; a shape of very many sides."""
    for number, (rows, name, sides) in enumerate(((15_000, "x" * 1_000_000, 2), (20, "x", 10**6), (100_000, "x", 1))):
        columns: dict[str, pa.Array] = {}
        for field in table.SCHEMA:
            if field.name == "shape":
                offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * sides)
                columns["shape"] = pa.ListArray.from_arrays(offsets, pa.array(np.ones(rows * sides, np.int64)))
            elif field.type == pa.string():
                codes = pa.array(np.zeros(rows, np.int32))
                columns[field.name] = pa.DictionaryArray.from_arrays(codes, [name])
            else:
                columns[field.name] = (
                    pa.array(np.zeros(rows), field.type, from_pandas=False, safe=False)
                    if field.type != pa.bool_()
                    else pa.array(np.zeros(rows, bool))
                )
        path = folder / f"proxies-{number}.parquet"
        fields = [pa.field(f.name, columns[f.name].type, nullable=f.nullable) for f in table.SCHEMA]
        made = pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields))
        pq.write_table(made, path, store_schema=False)
        yield "proxies", path


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a process with a limit found in each file."""
    jobs = [str(part) for job in bombs(tmp_path_factory.mktemp("bombs")) for part in job]
    command = [sys.executable, "-m", "tests.read_within", str(MEGABYTES), *jobs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(jobs) // 2
    return found


def test_each_is_refused_in_one_line(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        path = Path(outcome["path"])
        assert (outcome["error"] == "") == path.name.startswith("sound"), outcome
        assert "\n" not in outcome["error"] and (path.name in outcome["error"] or outcome["error"] == "")


def test_none_takes_half_a_gigabyte(outcomes: list[dict[str, Any]]) -> None:
    assert max(outcome["mb"] for outcome in outcomes) < MEGABYTES
    assert not any("memory" in outcome["error"].lower() for outcome in outcomes), "refused by the limit alone"
