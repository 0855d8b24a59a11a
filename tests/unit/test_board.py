"""The live display: what it shows, seconds left, and log lines beside it on a real pseudo-terminal."""

from __future__ import annotations

import io
import itertools
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from rwkvq.cli.board import Board, duration
from rwkvq.cli.terminal import without_controls
from rwkvq.family.events import CellEvent
from rwkvq.family.work import STAGE_SHARES, CellWork, Counted, Steady, cell_seconds_left, seconds_left
from rwkvq.run import LINE
from rwkvq.stages import STAGES

REPOSITORY = Path(__file__).parents[2]
CELLS = [f"rwkv7-{size} {policy}" for size in ("0.1b", "14b") for policy in ("rtn", "sq", "rwkvquant")]


class Clock:
    """Seconds that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def screen(width: int = 80, height: int = 24, *, is_terminal: bool = True) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=is_terminal,
        width=width,
        height=height,
        color_system=None,
        _environ={},
    )


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def last_table(console: Console) -> list[str]:
    """Lines of the table as it stands at the end."""
    lines = re.sub(r"\x1b\[[^m]*?[A-Za-z]", "", text_of(console)).splitlines()
    begin = max(index for index, line in enumerate(lines) if line.strip().startswith("cell "))
    return [line.strip("\r") for line in lines[begin:] if line.strip()]


def row_of(table: list[str], cell: str) -> str:
    return next(line for line in table if line.startswith(cell))


def feed(board: Board, *events: CellEvent) -> None:
    for event in events:
        board.update(event)


def tensors(cell: str, count: int, total: int, error: float = 0.05) -> Iterator[CellEvent]:
    for index in range(count):
        yield CellEvent(cell, "tensor", stage="quantize", what=f"tensor {index}", total=total, error=error)


def test_a_row_tells_state_blocks_tensors_error_and_time() -> None:
    clock, console = Clock(), screen()
    with Board(CELLS, dict.fromkeys(CELLS, 100.0), console=console, clock=clock) as board:
        feed(board, CellEvent(CELLS[0], "stage", stage="quantize"), *tensors(CELLS[0], 30, 60))
        feed(board, CellEvent(CELLS[0], "block", stage="quantize", what="block 3", done=1, total=12))
        feed(board, CellEvent(CELLS[1], "done", seconds=61.0), CellEvent(CELLS[2], "kept"))
        feed(board, CellEvent(CELLS[3], "failed", message="gone.pth: no such file"))
        clock.now = 75.0
    table = last_table(console)
    assert "1/12" in row_of(table, CELLS[0]) and "30/60" in row_of(table, CELLS[0])
    assert "5.00%" in row_of(table, CELLS[0]) and "1m15s" in row_of(table, CELLS[0])
    assert "done" in row_of(table, CELLS[1]) and "1m01s" in row_of(table, CELLS[1])
    assert "kept" in row_of(table, CELLS[2]) and "failed" in row_of(table, CELLS[3])
    assert "waiting" in row_of(table, CELLS[4])
    assert table[-1].startswith("2 of 6 cells done, 1 failed, 1 running")
    assert f"{CELLS[3]}: failed: gone.pth: no such file" in text_of(console)


@pytest.mark.parametrize("width", [80, 200])
def test_sixty_cells_fit_the_terminal(width: int) -> None:
    console, cells = screen(width), [f"rwkv7-{index:02d}b rwkvquant" for index in range(60)]
    with Board(cells, {}, console=console) as board:
        feed(board, *(CellEvent(cell, "done") for cell in cells[:30]))
        feed(board, *(CellEvent(cell, "stage", stage="evaluate") for cell in cells[58:]))
        feed(board, CellEvent(cells[40], "failed", message="full disk"))
    table = last_table(console)
    assert len(table) <= 23 and max(map(len, table)) <= width
    assert row_of(table, cells[40]) and row_of(table, cells[58]) and row_of(table, cells[59])
    hidden = next(line for line in table if line.startswith("and "))
    done, waiting = (int(re.search(rf"(\d+) {word}", hidden)[1]) for word in ("done", "waiting"))  # type: ignore[index]
    assert done + waiting + len(table) - 3 == 60


def test_names_from_outside_are_shown_as_they_are() -> None:
    console = screen()
    with Board(["[red]a\x1b[2J b"], {}, console=console):
        pass
    assert "[red]a\\x1b[2J b" in last_table(console)[1]


def test_many_threads_may_report() -> None:
    console = screen()
    with Board(CELLS, {}, console=console) as board:
        threads = [threading.Thread(target=feed, args=(board, *tensors(cell, 200, 200))) for cell in CELLS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum("200/200" in line for line in last_table(console)) == len(CELLS)


def test_shared_work_has_a_row_while_it_runs_and_is_no_cell() -> None:
    console, shared = screen(), "rwkv7-14b shared"
    with Board(CELLS, {}, console=console) as board:
        feed(board, CellEvent(shared, "stage", stage="windows", seconds=1.0))
        feed(board, CellEvent(shared, "stage", stage="activations"))
        feed(board, CellEvent(shared, "block", stage="activations", what="block 1", total=61))
    assert "stopped" in row_of(last_table(console), shared) and "1/61" in row_of(last_table(console), shared)
    assert last_table(console)[-1].startswith("0 of 6 cells done")
    console = screen()
    with Board(CELLS, {}, console=console) as board:
        feed(
            board, CellEvent(shared, "stage", stage="proxies"), CellEvent(shared, "stage", stage="proxies", seconds=2.0)
        )
    assert shared not in "".join(last_table(console))


def test_late_events_do_not_revive_a_cell_that_has_ended() -> None:
    cell = CellWork("cell", 100.0)
    cell.apply(CellEvent("cell", "stage", stage="quantize"), 0.0)
    cell.apply(CellEvent("cell", "failed", message="full disk"), 5.0)
    cell.apply(CellEvent("cell", "tensor", what="a", error=0.1), 6.0)
    assert (cell.state, cell.ended, cell.tensors.done) == ("failed", 5.0, 0)
    cell.apply(CellEvent("cell", "stage", stage="quantize"), 7.0)
    assert (cell.state, cell.ended) == ("running", None)


def test_stages_done_elsewhere_are_no_work_of_the_cell() -> None:
    cell = CellWork("cell", 100.0)
    cell.apply(CellEvent("cell", "stage", stage="quantize", total=40), 0.0)
    assert cell.ran == 0.0 and cell.share == pytest.approx(0.22) and cell.tensors.total == 40
    cell.apply(CellEvent("cell", "stage", stage="quantize", seconds=5.0), 5.0)
    cell.apply(CellEvent("cell", "stage", stage="pack"), 5.0)
    assert cell.ran == pytest.approx(0.54) and cell.share == pytest.approx(0.76)


def test_without_a_terminal_there_are_plain_lines_only() -> None:
    console = screen(is_terminal=False)
    with Board(CELLS[:3], {}, console=console) as board:
        feed(board, CellEvent(CELLS[0], "stage", stage="quantize"), *tensors(CELLS[0], 30, 60))
        feed(board, CellEvent(CELLS[0], "stage", stage="quantize", seconds=12.34), CellEvent(CELLS[2], "kept"))
        feed(board, CellEvent(CELLS[1], "failed", message="a\x1b[2Jb " + "long " * 40 + "end"))
        feed(board, CellEvent(CELLS[0], "done", seconds=12.5))
    lines = text_of(console).splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line).rstrip() for line in lines] == [
        f"{CELLS[2]}: up to date",
        f"{CELLS[1]}: failed: a\\x1b[2Jb " + "long " * 40 + "end",
        f"{CELLS[0]}: done in 12.5 s (2 of 3 cells done, 1 failed)",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text_of(console))


def test_a_dumb_terminal_gets_plain_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with Board(CELLS, {}, console=console) as board:
        feed(board, CellEvent(CELLS[0], "stage", stage="pack"), CellEvent(CELLS[0], "done", seconds=1.0))
    assert text_of(console).count("\n") == 1 and "\x1b" not in text_of(console)


def test_no_color_leaves_no_colour() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"NO_COLOR": "1", "TERM": "xterm"})
    with Board(CELLS, {}, console=console) as board:
        feed(board, CellEvent(CELLS[0], "stage", stage="pack"), CellEvent(CELLS[1], "failed", message="no"))
    codes = {code for codes in re.findall(r"\x1b\[([\d;]*)m", text_of(console)) for code in codes.split(";")}
    assert codes and not codes & {*map(str, range(30, 50)), *map(str, range(90, 108))}


def test_the_shares_are_those_of_the_stages() -> None:
    assert list(STAGE_SHARES) == list(STAGES) == list(LINE)
    assert sum(STAGE_SHARES.values()) == pytest.approx(1.0)


def test_a_repeated_unit_is_counted_once() -> None:
    counted = Counted()
    for name in ("a", "b", "a"):
        counted.add(CellEvent("cell", "tensor", what=name, total=4))
    assert counted.done == 2 and counted.share == 0.5
    counted.add(CellEvent("cell", "tensor", what="c", done=7, total=4))
    assert counted.done == 4


def simulated(
    speed: Callable[[int], float], *, cells: int = 8, estimate: float = 100.0, workers: int = 2
) -> Iterator[tuple[float, float]]:
    """(seconds left as said, seconds left in truth) while `workers` cells run at a time, `speed(cell)` x estimated."""
    work = [CellWork(f"cell {index}", estimate) for index in range(cells)]
    true = [estimate / speed(index) for index in range(cells)]
    free, begins = [0.0] * workers, []
    for seconds in true:
        slot = free.index(min(free))
        begins.append(free[slot])
        free[slot] += seconds
    end = max(free)
    for now in range(0, int(end), 2):
        for cell, begin, seconds in zip(work, begins, true, strict=True):
            part = (now - begin) / seconds
            if part >= 1 and cell.ended is None:
                cell.apply(CellEvent(cell.name, "done"), now)
            elif 0 <= part < 1:
                for stage in STAGE_SHARES:
                    cell.apply(CellEvent(cell.name, "progress", stage=stage, done=int(1000 * part), total=1000), now)
        yield seconds_left(work, workers, 0.0, now), end - now


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_seconds_left_become_right_however_wrong_the_estimate(factor: float) -> None:
    said = list(simulated(lambda cell: factor))
    assert all(left >= 0 for left, _ in said)
    for left, truth in said[len(said) // 4 : -len(said) // 10]:
        assert truth / 1.6 < left < truth * 1.6
    first, second = said[0][0], said[1][0]
    assert 0.5 < second / first < 2


def test_kept_work_is_no_progress_of_this_run() -> None:
    kept, waiting = CellWork("kept", 1000.0), CellWork("waiting", 100.0)
    kept.apply(CellEvent("kept", "kept"), 1.0)
    assert seconds_left([kept, waiting], 1, 0.0, 1.0) == pytest.approx(100.0, rel=0.3)


def test_the_slowest_running_cell_is_a_lower_bound() -> None:
    cells = [CellWork(f"cell {index}", 100.0) for index in range(8)]
    for cell in cells[:7]:
        cell.apply(CellEvent(cell.name, "stage", stage="quantize"), 0.0)
        cell.apply(CellEvent(cell.name, "done"), 100.0)
    cells[7].apply(CellEvent(cells[7].name, "stage", stage="quantize"), 99.0)
    left = seconds_left(cells, 8, 0.0, 100.0)
    assert left == cell_seconds_left(cells[7], cells, 100.0)
    assert left == pytest.approx(100.0, rel=0.2)


def test_the_shown_countdown_does_not_jump() -> None:
    steady = Steady()
    shown = [steady.show((1000.0 if tick < 40 else 100.0) - tick / 4, tick / 4) for tick in range(200)]
    assert all(0.7 < after / before < 1.3 for before, after in itertools.pairwise(shown))
    assert shown[-1] == pytest.approx(50.25, rel=0.1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599.6, "1h00m"), (7322, "2h02m"), (183600, "2d03h")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_control_characters_are_written_out() -> None:
    assert without_controls("a\x1b]0;b\x07\tc\nd\r\x9b") == "a\\x1b]0;b\\x07\tc\nd\\x0d\\x9b"


PROGRAM = """
import logging, logging.config, os, subprocess, sys, yaml
config = yaml.safe_load(open("flows/logging.yml"))
config["handlers"].pop("api")
config["loggers"] = {"rwkvq": {"level": "INFO"}}
logging.config.dictConfig(config)
from rwkvq.cli.board import Board
from rwkvq.family.events import CellEvent
cells = ["rwkv7-9m rtn", "rwkv7-9m sq"]
with Board(cells, {}) as board:
    # one write a line: under PYTHONUNBUFFERED print makes two, between which a writer of the same pipe may come
    child = "import os; [os.write(2, f'child {i} of stderr'.encode() + bytes([10])) for i in range(40)]"
    child = subprocess.Popen([sys.executable, "-c", child])
    for index in range(40):
        logging.getLogger("rwkvq.x").info("record %d " + "of a long line " * 8 + "end", index)
        os.write(2, f"raw {index} of stderr\\n".encode())
        print(f"printed {index}")
        board.update(CellEvent(cells[0], "tensor", what=str(index), total=40, error=0.1))
    child.wait()
    board.update(CellEvent(cells[1], "failed", message="no such file"))
logging.getLogger("rwkvq.x").info("after the board")
"""


def on_a_terminal(program: str, columns: int = 80, rows: int = 24) -> tuple[int, str]:
    """Exit code of a Python program whose three streams are a pseudo-terminal, and every byte it wrote there."""
    parent, child = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {
        "TERM": "xterm-256color",
        "COLUMNS": str(columns),
        "LINES": str(rows),
        "PYTHONPATH": str(REPOSITORY),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, stdin=child, stdout=child, stderr=child
    )
    os.close(child)
    written = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # how Linux says that nobody holds the other end
            break
        written += part
    os.close(parent)
    return process.wait(), written.decode()


def emulated(written: str, columns: int = 80) -> list[str]:
    """The lines that a terminal as wide as `columns` and as high as need be shows after `written`."""
    lines, row, column = [""], 0, 0
    for code, letter, character in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|([\s\S])", written):
        if letter == "A":
            row = max(row - int(code or 1), 0)
        elif letter == "K":
            lines[row] = "" if code == "2" else lines[row][:column]
        elif character == "\r":
            column = 0
        elif character == "\n" or (character and column == columns):
            row, column = row + 1, column if character == "\n" else 0
            lines += [""] * (row + 1 - len(lines))
        if character and character not in "\r\n":
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_lines_and_table_do_not_overwrite_each_other() -> None:
    code, written = on_a_terminal(PROGRAM)
    assert code == 0, written
    assert "\x1b[" in written
    lines = emulated(written)
    shown = "\n".join(lines)
    joined = "".join(line.ljust(80) for line in lines)
    for index in range(40):
        assert len(re.findall(rf"record {index} (of a long line ){{8}}end", joined)) == 1, shown
        for text in (f"raw {index} of stderr", f"child {index} of stderr", f"printed {index}"):
            assert lines.count(text) == 1, shown
    assert sum(line.startswith("cell ") for line in lines) == 1, shown
    table = lines[next(index for index, line in enumerate(lines) if line.startswith("cell ")) :]
    assert "40/40" in table[1] and "failed" in table[2] and table[3].startswith("0 of 2 cells done, 1 failed")
    assert re.fullmatch(r"\d\d:\d\d:\d\d after the board", table[4]), shown
