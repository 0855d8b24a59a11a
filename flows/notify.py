"""One message about the end of a family run to a webhook: off unless the environment names one in RWKVQ_WEBHOOK.

State hooks of the flow: `@flow(on_completion=[notify], on_failure=[notify], on_crashed=[notify],
on_cancellation=[notify])`. The address is a secret (whoever knows it can post there): only its host is ever said.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State

from rwkvq.errors import RwkvqError
from rwkvq.family.family import Family, load_family
from rwkvq.family.results import CellResult, read_summary

log = logging.getLogger("rwkvq.notify")

VARIABLE = "RWKVQ_WEBHOOK"
TIMEOUT_SECONDS = 10.0
TRIES = 3
PAUSE_SECONDS = 1.0
"""Before the second try; twice as long before the third."""


def notify(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Post how a run of the family ended, if its file's `notify` wants that. Never raises: a run is not lost for it."""
    url = os.environ.get(VARIABLE)
    if not url:
        return
    family = _family_of(flow_run)
    wanted = "failure" if family is None else family.file.notify
    if wanted == "never" or (wanted == "failure" and state.is_completed()):
        return
    host = _host(url)
    problem = post(url, message(flow.name, flow_run, state, family))
    if problem is None:
        log.info("told %s how the run ended", host)
    else:
        log.warning("could not tell %s how the run ended: %s; see %s", host, problem, VARIABLE)


def message(flow: str, flow_run: FlowRun, state: State[Any], family: Family | None) -> dict[str, Any]:
    """What is posted: flow, run, state, out, cells done, failed and not run, and a line for each that is not done.

    The counts are None where the run ended before it wrote a summary.
    """
    results = [] if family is None else _results_since(family, flow_run)
    failed = [result for result in results if result.state != "done"]
    counts = {kind: sum(result.state == kind for result in results) for kind in ("done", "failed", "not run")}
    return {
        "flow": flow,
        "run": flow_run.name,
        "state": state.name,
        "family": None if family is None else family.name,
        "cells": counts if results else None,
        "summary": [f"{result.name}: {result.state}: {result.error}" for result in failed],
        "out": None if family is None else str(family.out),
    }


def post(url: str, content: Mapping[str, Any]) -> str | None:
    """Post JSON, trying again where that may help; return None, or in a few words why it was not accepted."""
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            with _unlogged():
                answer = httpx.post(url, json=content, timeout=TIMEOUT_SECONDS)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            problem = type(error).__name__  # its text holds the address
            continue
        if answer.is_success:
            return None
        problem = f"answer {answer.status_code}"
        if answer.is_client_error and answer.status_code not in (408, 429):
            break
    return problem


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without httpx's own line for each request, which holds the address, in this thread."""
    here = threading.get_ident()
    http_log = logging.getLogger("httpx")

    def is_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    http_log.addFilter(is_elsewhere)
    try:
        yield
    finally:
        http_log.removeFilter(is_elsewhere)


def _family_of(flow_run: FlowRun) -> Family | None:
    """The family of the run, or None where its file cannot be read, which may be why the run failed."""
    try:
        return load_family(Path(flow_run.parameters["family_file"]), flow_run.parameters.get("overrides") or ())
    except (KeyError, RwkvqError, OSError) as error:
        log.warning("no details of the family in the message: %s", error)
        return None


def _results_since(family: Family, flow_run: FlowRun) -> list[CellResult]:
    """What this run wrote about its cells; nothing if the summary is an earlier run's."""
    begin = flow_run.start_time or flow_run.created
    try:
        written = family.summary.stat().st_mtime
    except OSError:
        return []
    return list(read_summary(family).values()) if begin is None or written >= begin.timestamp() else []


def _host(url: str) -> str:
    """The host of the address: all that may be said of it."""
    try:
        return urlsplit(url).hostname or f"the address in {VARIABLE}"
    except ValueError:
        return f"the address in {VARIABLE}"
