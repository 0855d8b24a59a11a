"""The `rwkvq` command: one module a group of commands, joined here. Heavy imports happen inside commands."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Annotated

import typer

from rwkvq.cli import family, inspection, line, outputs
from rwkvq.errors import RwkvqError

app = typer.Typer(
    name="rwkvq",
    help="Quantize RWKV-6 and RWKV-7 checkpoints to about 3 bits a weight, with an honest report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
line.register(app)
inspection.register(app)
outputs.register(app)
family.register(app)

log = logging.getLogger(__name__)

ERROR = 1
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a polite kill, the end of the terminal."""


class Interrupted(BaseException):
    """One of INTERRUPTIONS, `number`: not an Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what runs and why, as log lines.")] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("rwkvq").setLevel(logging.INFO if verbose else logging.WARNING)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 an error of one line, 2 wrong usage, 128 + signal interrupted."""
    sys.exit(run_app(app, arguments))


def run_app(command: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run a typer app on `arguments` (default: sys.argv) and return the exit code."""
    for number in INTERRUPTIONS:
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup
        signal.signal(number, _interrupt)
    try:
        command(args=arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except RwkvqError as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    except OSError as error:
        log.debug("the system refused", exc_info=True)
        print(f"error: {_refusal(error)}", file=sys.stderr)
        return ERROR
    except Interrupted as interruption:
        for number in INTERRUPTIONS:
            signal.signal(number, signal.SIG_IGN)  # the end is near; a second Ctrl-C must not spoil it
        with suppress(OSError):  # the terminal may be gone
            print("interrupted: finished work is kept; the same command goes on from there", file=sys.stderr)
        return 128 + interruption.number
    return 0


def _refusal(error: OSError) -> str:
    """One line for a refusal of the system that no module foresaw."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or ' '.join(str(error).split())}; check the path, its permissions and the disk"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
