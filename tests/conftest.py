"""Shared set-up: one torch thread, no network, no telemetry."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")

# numba does not see that a function in another file has changed (rwkvq/quantize/trellis_step.py)
_SOURCES = sorted((Path(__file__).parents[1] / "rwkvq" / "quantize").glob("*.py"))
_STATE = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"rwkvq-tests-{os.getuid()}-{_STATE}"))

import torch  # noqa: E402 - after the variables

torch.set_num_threads(1)
