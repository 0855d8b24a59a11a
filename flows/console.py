"""What of Prefect's log reaches the terminal: one plain line for each step, and no tracebacks twice.

Named by flows/logging.yml, which Prefect reads while it is imported: this module imports nothing of Prefect. A server
of one's own gets the whole log, tracebacks included. The handler writes to stderr and knows nothing of a live display:
that one takes in all of stderr while it is up (rwkvq/cli/terminal.py).
"""

from __future__ import annotations

import logging

from rwkvq.cli.terminal import without_controls

ENGINE = ("prefect.flow_runs", "prefect.task_runs")
BOOKKEEPING = (
    "Beginning ",
    "Finished in state ",
    "Encountered exception",
    "Crash detected",
    "Task run exceeded timeout",
    "View at ",
    "Running hook ",
    "Hook ",
    "Downloading flow code",
)
RUNNER = "prefect.runner"
WAITING = ("scheduled runs skipped (at capacity)", "Server returned a non-pending state 'SCHEDULED'")
"""How a runner ends its reports, several a minute, that a due run still waits for another one."""


class News(logging.Filter):
    """Drops the engine's state changes and its reports of errors: an error ends the command and is said there, once."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True for a line that a user wants to read."""
        if record.name == RUNNER:
            return not record.getMessage().endswith(WAITING)
        if not record.name.startswith(ENGINE):
            return True
        return not (record.exc_info or record.getMessage().startswith(BOOKKEEPING))


class Line(logging.Formatter):
    """`12:34:56 message`, with the level's name from WARNING up."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line without control characters; a traceback only for errors outside the engine."""
        level = f"{record.levelname} " if record.levelno >= logging.WARNING else ""
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return without_controls(f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}{trace}")
