"""A pool of worker processes for block jobs: killable, reusable, and gone when the parent is gone.

A worker is `python -m rwkvq.workers`. Jobs and answers are JSON lines over its standard streams, so only names of files
and numbers travel. A process, not a thread: a job can be stopped at its time limit, an out-of-memory kill takes one job
and not the run, and the quantizers' loops do not share one interpreter lock.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from rwkvq import errors

log = logging.getLogger(__name__)

OnEvent = Callable[[dict[str, Any]], None]


class WorkerDied(errors.RwkvqError):
    """A worker process ended before its job did (killed, out of memory); the job may be tried again."""


class JobTimeout(errors.RwkvqError):
    """A job ran past its time limit and its worker was stopped."""


class Worker:
    """One child process that runs one job at a time."""

    def __init__(self, threads: int) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        # the child inherits the mask: Ctrl-C goes to the whole process group, and only the parent decides what it means
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rwkvq.workers", str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def run(self, function: str, job: Mapping[str, Any], *, timeout: float, on_event: OnEvent) -> Any:
        """Run `package.module:function` on `job` in the child and return its JSON answer.

        Raises the job's own RwkvqError, WorkerDied, or JobTimeout after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"function": function, "job": dict(job)}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._death() from error
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty as error:
                self.kill()
                raise JobTimeout(
                    f"{function}: still running after {timeout:g} s and stopped; raise run.task_timeout"
                ) from error
            if line is None:
                raise self._death()
            message = json.loads(line)
            if "event" in message:
                on_event(message["event"])
            elif "error" in message:
                raise _rebuilt(message["error"])
            else:
                return message["answer"]

    def _death(self) -> WorkerDied:
        code = self._process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        hint = " (out of memory? use fewer run.workers)" if code == -signal.SIGKILL else ""
        return WorkerDied(f"worker process {self.pid}: {how} before its job was done{hint}")

    def is_alive(self) -> bool:
        """True while the child runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Stop the child at once; it keeps nothing that is not on disk."""
        self._process.kill()
        self._process.wait()


class WorkerPool:
    """Keeps idle workers for the next job, so that a process starts once and not once a block."""

    def __init__(self, workers: int, threads: int) -> None:
        self._threads = threads
        self._slots = threading.BoundedSemaphore(workers)
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        self._busy: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        for _ in range(workers):  # imports torch while earlier stages still run
            self._idle.put(Worker(threads))

    def run(self, function: str, job: Mapping[str, Any], *, timeout: float, retries: int, on_event: OnEvent) -> Any:
        """Run one job on a free worker; a worker that died is replaced, the job tried again up to `retries` times."""
        with self._slots:
            for attempt in range(retries + 1):
                worker = self._take()
                try:
                    return worker.run(function, job, timeout=timeout, on_event=on_event)
                except WorkerDied as death:
                    if self._closed:  # nobody shall try again
                        raise errors.RwkvqError("stopped together with the run") from death
                    if attempt == retries:
                        raise
                    log.warning("%s; trying again", death)
                finally:
                    self._give_back(worker)
            raise AssertionError("unreachable")

    def _take(self) -> Worker:
        with self._lock:
            while not self._closed:
                try:
                    worker = self._idle.get_nowait()
                except queue.Empty:
                    worker = Worker(self._threads)
                if worker.is_alive():
                    self._busy.add(worker)
                    return worker
        raise errors.RwkvqError("stopped together with the run, before this job began")

    def _give_back(self, worker: Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
            if self._closed:
                worker.kill()
            elif worker.is_alive():
                self._idle.put(worker)

    def close(self) -> None:
        """End all workers, the busy ones too; no job begins after that."""
        with self._lock:
            self._closed = True
            for worker in self._busy:
                worker.kill()
            while not self._idle.empty():
                self._idle.get_nowait().kill()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rebuilt(error: Mapping[str, str]) -> Exception:
    kind = getattr(errors, error["type"], None)
    if kind is errors.SettingsError or not (isinstance(kind, type) and issubclass(kind, errors.RwkvqError)):
        return errors.RwkvqError(error["message"])
    return kind(error["message"])


def _leave_with_parent(lines: queue.Queue[str]) -> None:
    """Read jobs; the end of the stream means that the parent is gone, whatever this process is doing."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def main() -> None:
    """Serve jobs until the parent closes the stream."""
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not break the protocol
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_leave_with_parent, args=(lines,), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    importlib.import_module("rwkvq.quantize.block")
    while True:
        request = json.loads(lines.get())
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        try:
            send({"answer": function(request["job"], lambda event: send({"event": event}))})
        except errors.RwkvqError as error:
            send({"error": {"type": type(error).__name__, "message": str(error)}})
        except Exception as error:
            log.exception("job failed")
            send({"error": {"type": "RwkvqError", "message": f"{type(error).__name__}: {error}"}})


if __name__ == "__main__":
    main()
