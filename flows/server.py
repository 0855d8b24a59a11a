"""The Prefect API that a flow reports to: the one that PREFECT_API_URL names, or an own one on the loopback interface.

Prefect would start a server of its own where none is named, but leave it behind when the flow is killed, and start one
more in every worker process. This one is a child that ends when its input stream ends, that is, with its parent. The
parent holds the socket it listens on: when the child dies, requests wait there until the next one has started.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
from prefect.client.orchestration import get_client
from prefect.context import refresh_global_settings_context
from prefect.exceptions import Abort
from prefect.settings import get_current_settings

from rwkvq.errors import RwkvqError
from rwkvq.files import make_folder

log = logging.getLogger("rwkvq.server")

SHUTDOWN_SECONDS = 15
MOST_DEATHS, PER_SECONDS = 3, 60.0
"""A server that dies so often in so short a time is not started again."""
BACKLOG = 512
"""Requests that wait while no server runs."""


def connect() -> None:
    """Have an API for the flows of this process and its workers. Raises RwkvqError if it does not answer.

    A server of one's own also gets the log; the embedded one is gone before anybody could read it there.
    """
    url = get_current_settings().api.url
    if url:
        os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "true")
        remedy = f"PREFECT_API_URL {url}: start a server there, or unset it for an embedded one"
    else:
        # in the environment, since threads and processes that Prefect starts look there
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{_start().port}/api"
        remedy = f"Prefect's embedded server: see {_log_file()}, or name a server in PREFECT_API_URL"
    refresh_global_settings_context()
    logging.raiseExceptions = False  # Prefect would print each line that did not reach a server that is gone
    quieter = LostEvents()
    for name in ("prefect._internal.concurrency", "prefect.events.clients"):
        logging.getLogger(name).addFilter(quieter)
    _wait_for_answer(remedy)
    if url:
        log.info("runs are shown by the server at %s", url)


def _log_file() -> Path:
    """Where the embedded server's own messages go."""
    return get_current_settings().home / "server.log"


class EmbeddedServer:
    """The server as a child process that is started again whenever it dies, on the same socket and data base."""

    def __init__(self, messages: Path) -> None:
        """Start it; its own messages go to the file `messages`. Raises OutputError, OSError."""
        make_folder(messages.parent)
        messages.write_text("")
        self._messages = messages
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self._lock = threading.Lock()
        self._is_stopping = False
        self._deaths: list[float] = []
        self.failure: str | None = None
        self._child = self._spawn()
        threading.Thread(target=self._supervise, name="embedded-server", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it answers; before it is ready, and after it died, requests wait."""
        port: int = self._listener.getsockname()[1]
        return port

    def _spawn(self) -> subprocess.Popen[bytes]:
        descriptor = self._listener.fileno()
        with self._messages.open("ab") as messages:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.server", str(descriptor)],
                pass_fds=(descriptor,),
                stdin=subprocess.PIPE,
                stdout=messages,
                stderr=messages,
                env=dict(os.environ, PREFECT__SERVER_EPHEMERAL="1", PREFECT__SERVER_FINAL="1", PREFECT_UI_ENABLED="0"),
                start_new_session=True,  # Ctrl-C is for the flow, which reports its end to the server
            )

    def _supervise(self) -> None:
        while self.failure is None:
            code = self._child.wait()
            with self._lock:
                if self._is_stopping:
                    return
                self._replace(f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}")

    def _replace(self, how: str) -> None:
        """Start the next server, or give up and let every request fail."""
        now = time.monotonic()
        self._deaths = [*(moment for moment in self._deaths if now - moment < PER_SECONDS), now]
        if len(self._deaths) < MOST_DEATHS:
            log.warning("Prefect's embedded server: %s; starting it again, what it knows is kept", how)
            try:
                self._child = self._spawn()
                return
            except OSError as error:
                how = f"cannot be started ({error.strerror})"
        else:
            how = f"{how}, {len(self._deaths)} times within {PER_SECONDS:g} s"
        self.failure = f"Prefect's embedded server: {how}; see {self._messages}, or name a server in PREFECT_API_URL"
        self._listener.close()

    def stop(self) -> None:
        """End the server; it may take a moment to write what it knows."""
        with self._lock:
            self._is_stopping = True
        stream: IO[bytes] | None = self._child.stdin
        assert stream is not None
        stream.close()
        try:
            self._child.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()


class LostEvents(logging.Filter):
    """Lets Prefect say once, and without their contents, that events did not reach a server that is gone."""

    def __init__(self) -> None:
        super().__init__()
        self._has_said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """True for the first such line."""
        if record.getMessage().startswith("Service 'EventsWorker' failed"):
            return False
        if not record.getMessage().startswith("Unable to connect to 'ws"):
            return True
        has_said, self._has_said = self._has_said, True
        return not has_said


_embedded: EmbeddedServer | None = None


def _start() -> EmbeddedServer:
    global _embedded
    # a proxy of the environment must not see requests to this machine
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    _embedded = EmbeddedServer(_log_file())
    atexit.register(_embedded.stop)  # after Prefect has sent its last events, which it does before `atexit`
    return _embedded


@contextmanager
def lost_server_named() -> Iterator[None]:
    """Turn a server that no longer answers into an RwkvqError: finished work is on disk, whatever became of it."""
    try:
        yield
    except RwkvqError:
        raise
    except (Exception, Abort) as error:
        if not (found := _embedded.failure if _embedded is not None else None):
            if not isinstance(error, httpx.HTTPError | Abort):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            found = f"the Prefect server at {get_current_settings().api.url} does not answer as it should ({reason})"
        raise RwkvqError(f"{found}; finished work is kept, the same command goes on from there") from error


def _wait_for_answer(what: str) -> None:
    """The embedded server listens before it is ready, so one patient request is enough."""
    limit = get_current_settings().server.ephemeral.startup_timeout_seconds
    with get_client(sync_client=True, httpx_settings={"timeout": limit}) as client:
        problem = client.api_healthcheck()
    if problem is not None:
        failure = _embedded.failure if _embedded is not None else None
        raise RwkvqError(failure or f"{what} (no answer: {type(problem).__name__})")


def serve(descriptor: int) -> None:
    """Run the server on an open socket until the input stream ends."""
    listener = socket.socket(fileno=descriptor)
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            "prefect.server.api.server:create_app",
            factory=True,
            log_level="error",
            timeout_graceful_shutdown=2,
            backlog=BACKLOG,
        )
    )

    def end_with_parent() -> None:
        sys.stdin.read()
        server.should_exit = True
        threading.Timer(SHUTDOWN_SECONDS, os.kill, (os.getpid(), signal.SIGKILL)).start()

    threading.Thread(target=end_with_parent, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    serve(int(sys.argv[1]))
