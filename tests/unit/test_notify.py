"""The webhook: what it is told, when, and that it can neither fail a run nor leak its address."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("prefect")

from prefect.client.schemas.objects import FlowRun, State, StateType

from flows import notify
from tests.small import write_inputs


@dataclass
class Webhook:
    """A local HTTP server that answers with `codes` in turn, the last one for ever."""

    url: str = ""
    codes: list[int] = field(default_factory=lambda: [204])
    received: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def listening() -> Iterator[Webhook]:
    hook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hook.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(hook.codes.pop(0) if len(hook.codes) > 1 else hook.codes[0])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    hook.url = f"http://127.0.0.1:{server.server_port}/secret-path"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hook
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    monkeypatch.setattr(notify, "PAUSE_SECONDS", 0.0)
    with listening() as hook:
        monkeypatch.setenv(notify.VARIABLE, hook.url)
        yield hook


def write_family(folder: Path, **values: Any) -> Path:
    """A family of one tiny model under two policies."""
    inputs = write_inputs(folder / "in")
    model, sections = inputs.pop("model"), {key: value for key, value in inputs.items() if key != "run_dir"}
    content = {
        "family": "tiny",
        "out": str(folder / "out"),
        "settings": sections,
        "models": {"m": {"model": model}},
        "policies": {"rtn": {"plan": {"policy": "rtn"}}, "sq": {"plan": {"policy": "sq"}}},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content | values))
    return path


def write_summary(folder: Path) -> None:
    cells = [
        {"model": "m", "policy": "rtn", "state": "done", "error": None, "seconds": 1.0},
        {"model": "m", "policy": "sq", "state": "failed", "error": "m.pth: holds NaN", "seconds": 2.0},
    ]
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "summary.json").write_text(json.dumps({"family": "tiny", "cells": cells}))


def call(file: Path | str, kind: StateType = StateType.FAILED, *, began: datetime | None = None) -> None:
    run = FlowRun.model_construct(
        name="brave-heron",
        parameters={"family_file": str(file), "overrides": ["quantize.bits=4"]},
        start_time=began or datetime.now(UTC) - timedelta(minutes=1),
        created=None,
    )
    notify.notify(SimpleNamespace(name="quantize-family"), run, State(type=kind))  # type: ignore[arg-type]


def test_it_says_what_became_of_the_cells(tmp_path: Path, webhook: Webhook) -> None:
    file = write_family(tmp_path)
    write_summary(tmp_path)
    call(file)
    assert webhook.received == [
        {
            "flow": "quantize-family",
            "run": "brave-heron",
            "state": "Failed",
            "family": "tiny",
            "cells": {"done": 1, "failed": 1, "not run": 0},
            "summary": ["m sq: failed: m.pth: holds NaN"],
            "out": str(tmp_path / "out"),
        }
    ]


def test_the_summary_of_an_earlier_run_is_not_told(tmp_path: Path, webhook: Webhook) -> None:
    file = write_family(tmp_path)
    write_summary(tmp_path)
    call(file, StateType.CRASHED, began=datetime.now(UTC) + timedelta(hours=1))
    assert webhook.received[0]["cells"] is None and webhook.received[0]["summary"] == []


@pytest.mark.parametrize(
    ("wanted", "kind", "count"),
    [
        ("failure", StateType.COMPLETED, 0),
        ("failure", StateType.FAILED, 1),
        ("failure", StateType.CRASHED, 1),
        ("failure", StateType.CANCELLED, 1),
        ("always", StateType.COMPLETED, 1),
        ("never", StateType.FAILED, 0),
    ],
)
def test_the_family_file_says_when(tmp_path: Path, webhook: Webhook, wanted: str, kind: StateType, count: int) -> None:
    call(write_family(tmp_path, notify=wanted), kind)
    assert len(webhook.received) == count


def test_it_is_off_without_the_variable(tmp_path: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notify.VARIABLE)
    call(write_family(tmp_path))
    assert webhook.received == []


def test_a_family_file_that_cannot_be_read_is_still_told(tmp_path: Path, webhook: Webhook) -> None:
    call(tmp_path / "gone.yaml")
    assert webhook.received[0]["state"] == "Failed" and webhook.received[0]["out"] is None


@pytest.mark.parametrize(
    ("codes", "tries", "said"), [([500, 503, 200], 3, "told"), ([500], 3, "could not"), ([404], 1, "could not")]
)
def test_it_is_tried_again_where_that_helps(
    tmp_path: Path, webhook: Webhook, caplog: pytest.LogCaptureFixture, codes: list[int], tries: int, said: str
) -> None:
    webhook.codes = codes
    with caplog.at_level(logging.INFO, "rwkvq.notify"):
        call(write_family(tmp_path))
    assert len(webhook.received) == tries
    assert any(record.message.startswith(f"{said}") for record in caplog.records)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}/secret-path", "http://[secret-path", "secret-path", "ftp://x/secret-path"]
)
def test_a_bad_address_neither_fails_nor_leaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    monkeypatch.setattr(notify, "PAUSE_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv(notify.VARIABLE, url.format(port=port))
    with caplog.at_level(logging.INFO):
        call(write_family(tmp_path))
    assert "could not tell" in caplog.text
    assert "secret-path" not in caplog.text


def test_httpx_does_not_log_the_address(tmp_path: Path, webhook: Webhook, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rwkvq.notify"), caplog.at_level(logging.INFO, logger="httpx"):
        call(write_family(tmp_path))
    assert len(webhook.received) == 1
    assert "127.0.0.1" in caplog.text and "secret-path" not in caplog.text
