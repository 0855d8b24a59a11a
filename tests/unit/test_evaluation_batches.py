from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.engine.model import Engine
from rwkvq.evaluation import batches, memory
from rwkvq.evaluation.batches import map_batches, map_hidden
from rwkvq.evaluation.continuations import Continuation, score_continuations
from rwkvq.evaluation.divergence import compare_on_text
from rwkvq.evaluation.memory import decoded_bytes, engines_for
from tests.tiny import write_tiny


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(open_checkpoint(write_tiny(tmp_path / "model.pth", "x070")))


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def test_results_come_in_order_from_single_threaded_workers(engine: Engine) -> None:
    torch.set_num_threads(3)
    meeting = threading.Barrier(3, timeout=20)  # passes only if three items run at the same time

    def work(item: int) -> tuple[int, int]:
        meeting.wait()
        return item, torch.get_num_threads()

    assert list(map_batches(work, [5, 6, 7], [engine])) == [(5, 1), (6, 1), (7, 1)]
    assert torch.get_num_threads() == 3


def test_an_error_comes_through_and_the_thread_count_back(engine: Engine) -> None:
    torch.set_num_threads(2)
    started = []

    def work(item: int) -> int:
        started.append(item)
        time.sleep(0.01)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(map_batches(work, list(range(300)), [engine]))
    assert torch.get_num_threads() == 2
    assert len(started) < 300  # what had not begun is given up


def test_engines_that_keep_no_blocks_get_one_batch_at_a_time(engine: Engine) -> None:
    torch.set_num_threads(2)
    streaming = Engine(engine.source, resident=False)
    here = threading.get_ident()
    threads = list(map_batches(lambda _: threading.get_ident(), [1, 2], [engine, streaming]))
    assert threads == [here, here]


def test_figures_are_the_same_bits_for_any_number_of_threads(engine: Engine) -> None:
    ids = torch.randint(1, 320, (6, 33), generator=torch.Generator().manual_seed(1))
    items = [Continuation((0, *row[: 5 * i].tolist()), tuple(row[30:].tolist())) for i, row in enumerate(ids)]
    figures = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        text = compare_on_text(engine, {"same": engine}, ids, batch=2)
        figures.append((text, score_continuations(engine, items, batch=2)))
    assert figures[0] == figures[1] == figures[2]


@pytest.mark.parametrize("group", [1, 20_000, 1 << 30])
def test_figures_are_the_same_bits_whether_blocks_are_kept_or_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    monkeypatch.setattr(batches, "GROUP_BYTES", group)
    ids = torch.randint(1, 320, (6, 33), generator=torch.Generator().manual_seed(1))
    items = [Continuation((0, *row[: 5 * i].tolist()), tuple(row[30:].tolist())) for i, row in enumerate(ids)]
    streaming = Engine(engine.source, resident=False)
    figures = []
    for one, threads in ((engine, 1), (streaming, 1), (streaming, 2)):
        torch.set_num_threads(threads)
        text = compare_on_text(one, {"same": one}, ids, batch=2)
        figures.append((text, score_continuations(one, items, batch=2)))
    assert figures[0] == figures[1] == figures[2]


def test_groups_hold_as_many_batches_as_fit_and_at_least_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [torch.zeros(1, length) for length in (4, 4, 4, 9, 1, 1)]
    monkeypatch.setattr(batches, "GROUP_BYTES", 8 * 3 * 128 * 4)  # 8 tokens of two engines
    found = list(batches._groups(items, lambda item: item, [engine, engine]))
    assert [[item.numel() for item in group] for group in found] == [[4, 4], [4], [9], [1, 1]]


def test_engines_keep_their_blocks_only_if_all_fit(engine: Engine) -> None:
    sources = {"a": engine.source, "b": engine.source}
    size = decoded_bytes(engine.source)
    assert size == sum(x.nbytes for x in (*engine._outer.values(), *engine._norm)) + sum(
        x.nbytes for index in range(2) for x in engine._block(index).values()
    )
    for factor, resident in ((2.01, True), (1.99, False)):
        found = engines_for(sources, factor * size / 1e9)
        assert [item.resident for item in found.values()] == [resident] * 2
    assert all(item.resident for item in engines_for(sources).values())


def test_a_containers_limit_counts_as_the_end_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    free = memory.free_bytes()
    assert free > 1 << 20
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert memory.free_bytes() == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() > 1 << 20


def test_no_head_of_the_group_before_stays_beside_a_block(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "GROUP_BYTES", 1)  # one item a group
    pair = [Engine(engine.source, resident=False) for _ in range(2)]
    held: list[list[int]] = []

    def hidden_of(ids: Sequence[torch.Tensor], workers: int) -> list[torch.Tensor]:
        held.append([len(other._outer) for other in pair])
        return original(ids, workers)

    original = pair[0].hidden_of
    monkeypatch.setattr(pair[0], "hidden_of", hidden_of)

    def score(item: torch.Tensor, states: list[torch.Tensor]) -> list[torch.Tensor]:
        return [other.logits(state) for other, state in zip(pair, states, strict=True)]

    list(map_hidden(score, [torch.ones(1, 3, dtype=torch.int64)] * 2, lambda ids: ids, pair))
    assert held == [[0, 0], [0, 0]]
