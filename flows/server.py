"""The Prefect API that a flow reports to: the one that PREFECT_API_URL names, or an own one on the loopback interface.

Prefect would start a server of its own where none is named, but leave it behind when the flow is killed, and start one
more in every worker process. This one is a child that ends when its input stream ends, that is, with its parent.
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
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.context import refresh_global_settings_context
from prefect.settings import get_current_settings

from rwkvq.errors import RwkvqError
from rwkvq.files import make_folder

log = logging.getLogger("rwkvq.server")

SHUTDOWN_SECONDS = 15


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
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{_start()}/api"
        remedy = f"Prefect's embedded server: see {_log_file()}, or name a server in PREFECT_API_URL"
    refresh_global_settings_context()
    _wait_for_answer(remedy)
    if url:
        log.info("runs are shown by the server at %s", url)


def _log_file() -> Path:
    """Where the embedded server's own messages go."""
    return get_current_settings().home / "server.log"


def _start() -> int:
    """Start the server and return its port, on which it answers as soon as it is ready."""
    make_folder(_log_file().parent)
    # a proxy of the environment must not see requests to this machine
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    with _log_file().open("w") as messages:
        child = subprocess.Popen(
            [sys.executable, "-m", "flows.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=dict(os.environ, PREFECT__SERVER_EPHEMERAL="1", PREFECT__SERVER_FINAL="1", PREFECT_UI_ENABLED="0"),
            text=True,
            start_new_session=True,  # Ctrl-C is for the flow, which reports its end to the server
        )
    atexit.register(_stop, child)  # after Prefect has sent its last events, which it does before `atexit`
    assert child.stdout is not None
    port = child.stdout.readline()
    if not port:
        raise RwkvqError(
            f"Prefect's embedded server: ended at once with exit code {child.wait()}; see its messages above"
        )
    return int(port)


def _stop(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(SHUTDOWN_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()


def _wait_for_answer(what: str) -> None:
    """The embedded server listens before it is ready, so one patient request is enough."""
    limit = get_current_settings().server.ephemeral.startup_timeout_seconds
    with get_client(sync_client=True, httpx_settings={"timeout": limit}) as client:
        problem = client.api_healthcheck()
    if problem is not None:
        raise RwkvqError(f"{what} (no answer: {type(problem).__name__})")


def serve() -> None:
    """Run the server until the input stream ends. The port is the first line of the output stream."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            "prefect.server.api.server:create_app", factory=True, log_level="error", timeout_graceful_shutdown=2
        )
    )

    def end_with_parent() -> None:
        sys.stdin.read()
        server.should_exit = True
        threading.Timer(SHUTDOWN_SECONDS, os.kill, (os.getpid(), signal.SIGKILL)).start()

    threading.Thread(target=end_with_parent, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    serve()
