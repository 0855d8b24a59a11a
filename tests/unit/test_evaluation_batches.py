from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.engine.model import Engine
from rwkvq.evaluation.batches import map_batches
from rwkvq.evaluation.continuations import Continuation, score_continuations
from rwkvq.evaluation.divergence import compare_on_text
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
