"""What the commands of this folder have in common with the `rwkvq` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer


def run_command(command: Callable[..., Any]) -> None:
    """Run a command line made of the function's parameters and exit with the codes of the `rwkvq` command."""
    from rwkvq.cli import run_app

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    sys.exit(run_app(app))
