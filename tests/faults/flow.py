"""Runs of the flow as real processes that can be stopped at a chosen file, broken, and run again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rwkvq.run import Run
from tests import processes
from tests.commands import copied_run, unfinished
from tests.small import LINE, settings_of, tree_hash

ROOT = Path(__file__).resolve().parents[2]
TAG = "RWKVQ_TEST_RUN"
"""Environment variable that marks the processes of one command, so that those of other runs are left alone."""
PAUSING = Path(__file__).with_name("pausing")
TENSOR = "block-000/blocks.0.att.value.weight.safetensors"
"""A tensor in the middle of the first block."""
Undisturbed = tuple[Path, dict[str, Any]]


def eventually(condition: Callable[[], object], seconds: float = 400) -> bool:
    """Whether the condition comes true within some time; a flow of its own takes long on a busy machine."""
    return processes.eventually(condition, seconds)


@contextmanager
def server(environment: dict[str, str], port: int) -> Iterator[None]:
    """A Prefect server of one's own, until the block ends: then it is killed."""
    start = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    process = subprocess.Popen(
        [sys.executable, *start],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with socket.socket() as probe:
            assert eventually(lambda: probe.connect_ex(("127.0.0.1", port)) == 0)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass
class Started:
    """A running command. Everything that it and its children say goes to one file."""

    process: subprocess.Popen[bytes]
    tag: str
    said: Path
    mark: Path

    def log(self) -> str:
        """What was said so far."""
        return self.said.read_text(errors="replace")

    def family(self, part: str = "") -> list[psutil.Process]:
        """Living processes of this command, itself included, with `part` in their command line."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE or process.environ().get(TAG) != self.tag:
                    continue
                if part in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue  # it ended, or is not ours
        return found

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        return self.family("rwkvq.worker_main")

    def server(self) -> psutil.Process:
        """Its embedded Prefect server."""
        assert eventually(lambda: self.family("flows.server")), self.log()
        return self.family("flows.server")[0]

    def wait_until_paused(self) -> None:
        """Wait until a process is about to finish the file that was named."""
        assert eventually(lambda: self.mark.exists() or self.process.poll() is not None), self.log()
        assert self.mark.exists(), self.log()

    def waiting(self) -> psutil.Process:
        """The process that waits."""
        return psutil.Process(int(self.mark.read_text()))

    def resume(self) -> None:
        """Let the process that waits go on."""
        self.mark.unlink()

    def wait_for(self, words: str, seconds: float = 400) -> None:
        """Wait until `words` were said."""
        assert eventually(lambda: words in self.log() or self.process.poll() is not None, seconds), self.log()
        assert words in self.log()

    def finish(self, code: int = 0) -> str:
        """Wait for the end, check the exit code and that nothing is left behind; return what was said."""
        self.process.wait(timeout=400)
        assert self.process.returncode == code, self.log()
        assert "Traceback" not in self.log(), self.log()
        assert eventually(lambda: not self.family()), self.family()
        return self.log()

    def fail(self, *words: object, code: int = 1) -> str:
        """The end with an error of one line that holds `words`; returns that line."""
        lines = [line for line in self.finish(code).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:], self.log()
        for word in words:
            assert str(word) in errors[0], f"{word!r} not in {errors[0]!r}"
        return errors[0]

    def strike(self) -> None:
        """kill -9; what it started ends by itself."""
        self.process.kill()
        self.process.wait()
        self.mark.unlink(missing_ok=True)
        assert eventually(lambda: not self.family()), self.family()


@dataclass
class Flow:
    """The flow on one run folder below `folder`, with a Prefect home or server of the whole session."""

    folder: Path
    undisturbed: Undisturbed
    environment: dict[str, str]
    started: list[Started] = field(default_factory=list)

    @property
    def run(self) -> Run:
        """The run, as files."""
        return Run(settings_of(self.undisturbed[1] | {"run_dir": str(self.folder / "run")}))

    @property
    def params(self) -> Path:
        """Its settings file."""
        return self.folder / "params.yaml"

    def prepare(self, before: str, **values: Any) -> None:
        """Have the undisturbed results of all stages before stage `before` in the run folder, and the settings file.

        Those of evaluate and report are there too: they stay up to date if pack comes out as before, which saves time.
        """
        names = list(LINE)
        source = self.undisturbed[0], self.undisturbed[1] | values
        later = {"evaluate", "report"} - {before}
        copied_run(
            source, self.folder, [*names[: names.index(before)], *sorted(later - {*names[: names.index(before)]})]
        )

    def start(self, *overrides: str, at: str = "", fault: str = "pause", **variables: str) -> Started:
        """Start the flow. at: the end of the path of the file before whose completion `fault` happens."""
        tag = uuid.uuid4().hex
        said, mark = self.folder / f"said-{tag}", self.folder / f"mark-{tag}"
        environment = self.environment | variables | {TAG: tag, "PYTHONPATH": str(PAUSING)}
        if at:
            environment |= {"FAULT": fault, "FAULT_AT": at, "FAULT_MARK": str(mark)}
        sets = [part for override in overrides for part in ("--set", override)]
        with said.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.quantize_model", "--params", str(self.params), *sets],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.started.append(Started(process, tag, said, mark))
        return self.started[-1]

    def paused(self, at: str, *overrides: str, **variables: str) -> Started:
        """Start the flow and wait until it is about to finish the file whose path ends with `at`."""
        command = self.start(*overrides, at=at, **variables)
        command.wait_until_paused()
        return command

    def tensors(self) -> dict[Path, int]:
        """Modification time of every finished tensor."""
        return {path: path.stat().st_mtime_ns for path in self.run.quantized.glob("*/*.safetensors")}

    def assert_same(self, kept: dict[Path, int] | None = None) -> None:
        """The artifact has the bytes of an undisturbed run, and the tensors in `kept` were not made again."""
        assert tree_hash(self.run.artifact) == tree_hash(self.undisturbed[0] / "run" / "artifact")
        assert {path: path.stat().st_mtime_ns for path in kept or {}} == (kept or {})
        assert unfinished(self.run.folder) == []

    def end(self) -> None:
        """Kill what is left of this test."""
        for command in self.started:
            command.mark.unlink(missing_ok=True)
            for process in command.family():
                process.send_signal(signal.SIGKILL)


def environment_of(home: Path) -> dict[str, str]:
    """The environment of a user who has set nothing of Prefect, with the Prefect home `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "DO_NOT_TRACK"))}
    return kept | {"PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1", "RWKVQ_CACHE": str(home / "cache")}
