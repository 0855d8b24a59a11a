"""Turns: by rank, never more at once than allowed, and none after the end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("prefect")

from flows.turns import Turns
from rwkvq.errors import RwkvqError


def test_those_who_wait_go_by_rank() -> None:
    turns = Turns(1)
    order: list[int] = []

    def work(rank: int) -> None:
        with turns.turn(rank):
            order.append(rank)

    with ThreadPoolExecutor(4) as pool:
        with turns.turn(0):
            futures = [pool.submit(work, rank) for rank in (3, 1, 4, 2)]
            while turns.waiting < 4:
                time.sleep(0.001)
            assert order == []
        for future in futures:
            future.result()
    assert order == [1, 2, 3, 4]


def test_no_more_at_once_than_allowed() -> None:
    turns, both = Turns(2), threading.Barrier(2)
    inside: list[int] = []
    most: list[int] = []

    def work(rank: int) -> None:
        with turns.turn(rank):
            inside.append(rank)
            both.wait(60)  # two are inside together
            most.append(len(inside))
            inside.remove(rank)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert max(most) == 2


def test_nobody_begins_after_the_end() -> None:
    turns = Turns(1)

    def work() -> None:
        with turns.turn(1):
            raise AssertionError("began")

    with ThreadPoolExecutor(1) as pool, turns.turn(0):
        future = pool.submit(work)
        while turns.waiting < 1:
            time.sleep(0.001)
        turns.close()
        with pytest.raises(RwkvqError, match="stopped together with the run"):
            future.result()
