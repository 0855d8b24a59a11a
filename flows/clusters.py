"""A dask cluster on this machine that all sub-flows of a flow share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rwkvq.errors import RwkvqError
from rwkvq.run import Run


@contextmanager
def local_cluster(run: Run) -> Iterator[str | None]:
    """Address of a cluster of run.workers processes while the block lasts; None where the settings need none.

    Raises RwkvqError if the extra `dask` is not installed.
    """
    if run.settings.run.runner != "dask" or run.settings.run.dask_address:
        yield None
        return
    try:
        from distributed import LocalCluster
    except ImportError as error:
        raise RwkvqError("run.runner: dask needs the extra `dask`; pip install 'rwkvq[dask]'") from error
    with LocalCluster(n_workers=run.workers, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        yield str(cluster.scheduler_address)
