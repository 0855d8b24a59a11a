"""Polite ends, and a clock that jumps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.commands import unfinished
from tests.faults.flow import TENSOR, Flow

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("number", "to"),
    [(signal.SIGINT, "group"), (signal.SIGTERM, "flow"), (signal.SIGTERM, "group"), (signal.SIGHUP, "group")],
)
def test_a_polite_end_cleans_up_and_says_how_to_go_on(alone: Flow, number: signal.Signals, to: str) -> None:
    alone.prepare("quantize")
    command = alone.paused(TENSOR)
    kept = alone.tensors()
    (os.kill if to == "flow" else os.killpg)(command.process.pid, number)
    log = command.finish(128 + number)
    assert log.rstrip().splitlines()[-1] == "interrupted: finished work is kept; the same command goes on from there"
    assert "error" not in log.lower()
    assert [path for path in unfinished(alone.run.folder) if "quantized" not in path] == []
    alone.start().finish()
    alone.assert_same(kept)


def test_a_hang_up_after_nohup_changes_nothing(alone: Flow) -> None:
    alone.prepare("pack")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the flow inherits it, as from nohup
    try:
        command = alone.paused("/model.safetensors")
    finally:
        signal.signal(signal.SIGHUP, before)
    os.killpg(command.process.pid, signal.SIGHUP)
    command.resume()
    command.finish()
    alone.assert_same()


JUMPING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
/* every second of real time, the clock of the wall is a day later or earlier than the second before */
static time_t jump(time_t now) { return now % 2 ? now + 86400 : now - 86400; }
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, at);
    if (code == 0 && id == CLOCK_REALTIME) at->tv_sec = jump(at->tv_sec);
    return code;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


def test_a_clock_that_jumps_changes_nothing(alone: Flow, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    (tmp_path / "jump.c").write_text(JUMPING)
    library = tmp_path / "jump.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "jump.c", "-ldl"], check=True)
    seen = {
        subprocess.run(["date", "+%F"], env=os.environ | {"LD_PRELOAD": str(library)}, capture_output=True).stdout
        for _ in range(50)
        if not subprocess.run(["sleep", "0.05"], check=False).returncode
    }
    assert len(seen) == 2, "the clock does not jump"
    alone.prepare("windows")
    alone.start(LD_PRELOAD=str(library)).finish()
    alone.assert_same()
