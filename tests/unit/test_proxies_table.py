"""The table of proxies: what is measured, and the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rwkvq.checkpoint.names import weights_of
from rwkvq.checkpoint.reader import Checkpoint, open_checkpoint
from rwkvq.errors import CheckpointError, PlanError
from rwkvq.proxies import table
from rwkvq.proxies.coarse import coarse
from rwkvq.proxies.fine import fine
from rwkvq.proxies.gaps import GAP_MODES, gaps_of, spectrum
from rwkvq.settings import ProxiesSettings
from tests.tiny import write_tiny


def rows_of(source: Checkpoint, settings: ProxiesSettings | None = None) -> list[table.Row]:
    weights = weights_of(source.spec, {name: source.shape(name) for name in source.names()})
    return table.measure_block(source, weights, settings or ProxiesSettings())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("tiny") / "x060.safetensors", "x060"))


def test_measure_holds_every_gap_mode() -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).half()
    measures = table.measure(weight, ProxiesSettings(order=5, quantiles=16))
    for mode in GAP_MODES:
        gaps = gaps_of(spectrum(weight), mode, quantiles=16)
        found = measures.of_mode(mode)
        assert (found.count, found.p_c, found.p_f) == (gaps.count, coarse(gaps), fine(gaps, order=5))
        assert not found.degenerate
    assert measures.quantile.count == 16
    assert measures.max_over_rms == pytest.approx(
        float(weight.float().abs().max() / weight.float().square().mean().sqrt())
    )


def test_every_matrix_lora_factor_and_vector_gets_a_row(source: Checkpoint) -> None:
    rows = rows_of(source)
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) == 2 * (16 + 8)
    assert {row.weight_class for row in rows} == {"matrix", "lora", "elementwise"}
    slices = [row for row in rows if "time_maa_w2" in row.name and row.block == 1]
    assert [row.name[-2:] for row in slices] == [".w", ".k", ".v", ".r", ".g"]
    assert all(row.shape == (128, 16) and row.numel == 2048 and row.dtype == "bfloat16" for row in slices)
    assert len({row.measures for row in slices}) == 5


def test_slices_are_measured_one_by_one(source: Checkpoint) -> None:
    third = source.tensor("blocks.0.att.time_maa_w2")[2]
    (row,) = [row for row in rows_of(source) if row.name == "blocks.0.att.time_maa_w2.v"]
    assert row.measures == table.measure(third, ProxiesSettings())


def test_file_round_trip_is_exact_and_deterministic(source: Checkpoint, tmp_path: Path) -> None:
    rows = [replace(row, block=None) if row.block == 1 else row for row in rows_of(source)]
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for path in (first, second):
        table.write(path, rows, {"model": "abc"})
    assert table.read(first) == rows
    assert first.read_bytes() == second.read_bytes()
    assert pq.read_schema(first).metadata[b"model"] == b"abc"
    assert {"name", "numel", "p_c_unique", "p_f_raw", "mad_quantile", "max_over_rms"} <= set(
        pq.read_schema(first).names
    )


def test_infinite_weight_is_named(source: Checkpoint) -> None:
    class Damaged:
        path, spec = source.path, source.spec

        def tensor(self, name: str) -> torch.Tensor:
            tensor = source.tensor(name).clone()
            if name == "blocks.1.ffn.key.weight":
                tensor[3, 4] = torch.inf
            return tensor

    weights = weights_of(source.spec, {name: source.shape(name) for name in source.names()})
    with pytest.raises(CheckpointError, match=r"x060.safetensors: blocks.1.ffn.key.weight: .* 1 values are NaN or inf"):
        table.measure_block(Damaged(), weights, ProxiesSettings())  # type: ignore[arg-type]


def test_damaged_or_foreign_files_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "proxies.parquet"
    with pytest.raises(PlanError, match="stage `proxies`"):
        table.read(path)
    table.write(path, rows_of(source), {})
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(PlanError, match=r"proxies.parquet: not a readable table"):
        table.read(path)
    path.write_bytes(bytes(data)[:100])
    with pytest.raises(PlanError, match=r"proxies.parquet: not a readable table"):
        table.read(path)
    pq.write_table(pa.table({"name": ["x"]}), path)
    with pytest.raises(PlanError, match="columns are not those"):
        table.read(path)
