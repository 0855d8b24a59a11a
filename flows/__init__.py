"""Prefect flows: which tasks run, in what order, on which runner.

Prefect and dask read these variables while they are imported, so they are set before any module of this package runs.
"""

import os
from pathlib import Path

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_SETTINGS_PATH", str(Path(__file__).with_name("logging.yml")))
os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
