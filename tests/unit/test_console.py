"""What of Prefect's log reaches the terminal."""

from __future__ import annotations

import logging
import logging.config
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.console import Line, News

CONFIG = Path(__file__).parents[2] / "flows" / "logging.yml"


def record(name: str, message: str, level: int = logging.INFO, error: Any = None) -> logging.LogRecord:
    return logging.LogRecord(name, level, __file__, 1, message, (), error)


@pytest.mark.parametrize("message", ["Beginning flow run 'x'", "Finished in state Failed", "Encountered exception y"])
@pytest.mark.parametrize("engine", ["prefect.flow_runs", "prefect.task_runs.x"])
def test_bookkeeping_of_the_engine_is_dropped(engine: str, message: str) -> None:
    assert not News().filter(record(engine, message))
    assert News().filter(record("rwkvq.stages", message))


def test_a_runner_does_not_repeat_that_a_run_waits() -> None:
    assert not News().filter(record("prefect.runner", "1 scheduled runs skipped (at capacity)"))
    waits = "Aborted submission of flow run 'x': Server returned a non-pending state 'SCHEDULED'"
    assert not News().filter(record("prefect.runner", waits))
    assert News().filter(record("prefect.runner", "Cancelled flow run 'x'"))


def test_what_a_flow_says_is_shown() -> None:
    assert News().filter(record("prefect.flow_runs", "quantize: done in 3 s"))


def test_an_error_of_the_engine_is_said_once_elsewhere() -> None:
    try:
        raise ValueError("bad")
    except ValueError:
        error = sys.exc_info()
    assert not News().filter(record("prefect.task_runs", "it failed", logging.ERROR, error))
    assert "ValueError: bad" in Line().format(record("rwkvq", "it failed", logging.ERROR, error))


def test_a_line_is_time_level_and_message() -> None:
    assert Line().format(record("rwkvq", "news"))[8:] == " news"
    assert Line().format(record("rwkvq", "news", logging.WARNING))[8:] == " WARNING news"


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert Line().format(record("rwkvq", "a\x1b[2Jb"))[8:] == " a\\x1b[2Jb"


def test_no_handler_lets_a_secret_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKVQ_WEBHOOK", "https://example.org/very-secret-path")
    config = yaml.safe_load(CONFIG.read_text())
    assert all("secrets" in handler["filters"] for handler in config["handlers"].values())
    secrets = logging.config.DictConfigurator(config).configure_filter(config["filters"]["secrets"])
    entry = record("rwkvq", "asked https://example.org/very-secret-path and me:pass@x")
    assert secrets.filter(entry)
    assert "very-secret-path" not in Line().format(entry)
