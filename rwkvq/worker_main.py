"""What a worker process runs: jobs from its standard input, one JSON line each; see rwkvq/workers.py."""

from __future__ import annotations

import importlib
import json
import logging
import os
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rwkvq import errors

log = logging.getLogger(__name__)


def _leave_with_parent(lines: queue.Queue[str]) -> None:
    """Read jobs; the end of the stream means that the parent is gone, whatever this process is doing."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _described(error: Exception) -> dict[str, str]:
    """Kind and message of a failed job's error, for the parent."""
    if errors.is_out_of_memory(error):
        return {"type": "OutOfMemory", "message": f"not enough memory ({' '.join(str(error).split())[:200]})"}
    if isinstance(error, errors.RwkvqError):
        return {"type": type(error).__name__, "message": str(error)}
    log.error("job failed", exc_info=error)
    return {"type": "RwkvqError", "message": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Serve jobs until the parent closes the stream."""
    import torch

    threads, places = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not break the protocol
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_leave_with_parent, args=(lines,), daemon=True).start()

    lock = threading.Lock()

    def serve(request: dict[str, Any]) -> None:
        def send(**message: Any) -> None:
            with lock:
                out.write(json.dumps({"job": request["number"], **message}) + "\n")
                out.flush()

        module, _, name = request["function"].partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
            send(answer=function(request["job"], lambda event: send(event=event)))
        except Exception as error:
            send(error=_described(error))

    with suppress(OSError):  # where memory runs out, a worker ends and not the run
        Path("/proc/self/oom_score_adj").write_text("500")
    importlib.import_module("rwkvq.quantize.block")
    with ThreadPoolExecutor(places) as pool:
        while True:
            request = json.loads(lines.get())
            if places == 1:
                serve(request)
            else:
                pool.submit(serve, request)


if __name__ == "__main__":
    main()
