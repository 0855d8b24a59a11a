"""A pool of worker processes for block jobs: killable, reusable, and gone when the parent is gone.

A worker is `python -m rwkvq.worker_main`. Jobs and answers are JSON lines over its standard streams, so only names of
files and numbers travel. A process, not a thread: a job can be stopped at its time limit, an out-of-memory kill takes
one job and not the run, and the quantizers' loops do not share one interpreter lock. Jobs on one GPU share a process
all the same, each on a thread: a GPU runs the kernels of several processes in turns, those of one side by side.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rwkvq import errors

log = logging.getLogger(__name__)

OnEvent = Callable[[dict[str, Any]], None]
Job = Mapping[str, Any]

MEMORY_REMEDY = "free some memory or use a machine with more, then run again; finished work is kept"


class WorkerDied(errors.RwkvqError):
    """A worker process ended before its job did; the job may be tried again."""


class WorkerKilled(WorkerDied):
    """A worker process was killed by SIGKILL, as the system does when memory runs out."""


class JobTimeout(errors.RwkvqError):
    """A job ran past its time limit and its worker was stopped."""


class Worker:
    """One child process, which runs up to `places` jobs at once."""

    def __init__(self, threads: int, places: int = 1) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        # the child inherits the mask: what goes to the whole process group, only the parent decides what it means
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rwkvq.worker_main", str(threads), str(places)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._messages: dict[int, queue.Queue[dict[str, Any] | None]] = {}
        """Of the jobs that run now, by their number; None = the child has ended."""
        self._has_ended = False
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # else it died in the middle of the line
                message = json.loads(line)
                with self._lock:
                    if messages := self._messages.get(message["job"]):
                        messages.put(message)
        with self._lock:
            self._has_ended = True
            for waiting in self._messages.values():
                waiting.put(None)

    def run(self, function: str, job: Job, *, timeout: float, on_event: OnEvent, label: str) -> Any:
        """Run `package.module:function` on `job` in the child and return its JSON answer. `label` names it in errors.

        Raises the job's own RwkvqError, OutOfMemory, WorkerDied, or JobTimeout after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        number, messages = next(self._numbers), queue.Queue[dict[str, Any] | None]()
        with self._lock:
            self._messages[number] = messages
            if self._has_ended:
                messages.put(None)
        try:
            self._send({"number": number, "function": function, "job": dict(job)}, label)
            while True:
                try:
                    message = messages.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty as error:
                    self.kill()
                    raise JobTimeout(
                        f"{label}: still running after {timeout:g} s and stopped; raise run.task_timeout"
                    ) from error
                if message is None:
                    raise self._death(label)
                if "event" in message:
                    on_event(message["event"])
                elif "error" in message:
                    raise self._rebuilt(message["error"], label)
                else:
                    return message["answer"]
        finally:
            with self._lock:
                del self._messages[number]

    def _send(self, request: dict[str, Any], label: str) -> None:
        assert self._process.stdin is not None
        try:
            with self._lock:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
        except OSError as error:
            raise self._death(label) from error

    def _death(self, label: str) -> WorkerDied:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            why = f"killed by signal {-code}, as the system does when memory runs out"
            return WorkerKilled(f"{label}: worker {self.pid}: {why}")
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return WorkerDied(f"{label}: worker {self.pid}: {how} before its job was done")

    def _rebuilt(self, error: Mapping[str, str], label: str) -> Exception:
        kind = getattr(errors, error["type"], None)
        if kind is errors.OutOfMemory:
            self.kill()  # the next job gets a process with unspent memory
            return errors.OutOfMemory(f"{label}: worker {self.pid}: {error['message']}")
        if kind is errors.SettingsError or not (isinstance(kind, type) and issubclass(kind, errors.RwkvqError)):
            return errors.RwkvqError(error["message"])
        return kind(error["message"])

    def is_alive(self) -> bool:
        """True while the child runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Stop the child at once; it keeps nothing that is not on disk."""
        self._process.kill()
        self._process.wait()


class WorkerPool:
    """Keeps idle workers for the next job, so that a process starts once and not once a block. Any thread may use it.

    A job that runs out of memory is tried again beside fewer others: the pool goes on with one worker less, never
    below one.
    """

    def __init__(self, workers: int, threads: int, *, one_process: bool = False) -> None:
        """workers: jobs that may run at once, each in a process of its own or all in one (for a GPU)."""
        self._threads = threads
        self._workers = workers
        self._places = workers if one_process else 1
        self._slots = workers
        self._running = 0
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._taken: Counter[Worker] = Counter()
        # imports torch while earlier stages still run
        self._processes = [Worker(threads, self._places) for _ in range(1 if one_process else workers)]
        """Those that did something last at the end."""

    @property
    def slots(self) -> int:
        """How many jobs may run at once: as many as there were workers, less those that memory did not suffice for."""
        return self._slots

    def run(
        self,
        function: str,
        job: Job,
        *,
        timeout: float,
        retries: int,
        on_event: OnEvent,
        label: str = "",
        alone: bool = False,
    ) -> Any:
        """Run one job on a free worker and return its answer. `label` (default: `function`) names it in messages.

        alone: in a process that runs nothing else meanwhile, for jobs that change what holds for the whole process.
        A worker that died is replaced and the job tried again up to `retries` times. Being tried again with less
        parallelism does not count. Raises what the job raises, JobTimeout, WorkerDied, OutOfMemory.
        """
        failures = 0
        while True:
            with self._slot() as slots:
                try:
                    with self._worker(self._places if alone else 1) as worker:
                        return worker.run(function, job, timeout=timeout, on_event=on_event, label=label or function)
                except (WorkerDied, errors.OutOfMemory) as failure:
                    if self._closed:  # nobody shall try again
                        raise errors.RwkvqError("stopped together with the run") from failure
                    if not self._give_way(failure, slots):
                        failures += 1
                        self._check_retry(failure, failures, retries)

    @contextmanager
    def _slot(self) -> Iterator[int]:
        """Wait until fewer jobs run than may; yields how many may."""
        with self._lock:
            self._changed.wait_for(lambda: self._closed or self._running < self._slots)
            self._running += 1
            slots = self._slots
        try:
            yield slots
        finally:
            with self._lock:
                self._running -= 1
                self._changed.notify_all()

    def _give_way(self, failure: errors.RwkvqError, slots: int) -> bool:
        """Whether the job that failed beside up to `slots` - 1 others now gets more memory than it had."""
        if not isinstance(failure, WorkerKilled | errors.OutOfMemory):
            return False
        with self._lock:
            if self._slots == slots:  # no other job has given way since this one began
                if slots == 1:
                    return False
                self._slots -= 1
            log.warning("%s; going on with %d of %d workers", failure, self._slots, self._workers)
        return True

    def _check_retry(self, failure: errors.RwkvqError, failures: int, retries: int) -> None:
        """Say that the job is tried again, or raise `failure` with what to do."""
        if failures <= retries:
            log.warning("%s; trying again", failure)
        elif isinstance(failure, WorkerKilled | errors.OutOfMemory):
            raise type(failure)(f"{failure}, with one worker left; {MEMORY_REMEDY}") from failure
        else:
            raise failure

    @contextmanager
    def _worker(self, needed: int) -> Iterator[Worker]:
        """A living worker with so many free places, the one that did something last if there are several."""
        with self._lock:
            if self._closed:
                raise errors.RwkvqError("stopped together with the run, before this job began")
            self._processes = [process for process in self._processes if process.is_alive()]
            free = [process for process in self._processes if self._taken[process] + needed <= self._places]
            worker = free[-1] if free else Worker(self._threads, self._places)
            if not free:
                self._processes.append(worker)
            self._taken[worker] += needed
        try:
            yield worker
        finally:
            with self._lock:
                self._taken[worker] -= needed
                if worker in self._processes:
                    self._processes.remove(worker)
                    self._processes.append(worker)

    def close(self) -> None:
        """End all workers, the busy ones too; no job begins after that."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            for process in self._processes:
                process.kill()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
