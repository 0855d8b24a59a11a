"""Imported at the start of every process of a run under test: has a fault happen at one place, or time for one.

FAULT_AT: the end of a path. The first process that is about to rename a finished file to such a path writes its process
id into the file FAULT_MARK and, by FAULT,
  pause: goes on when somebody has deleted that file;
  starve: asks for more memory than it is allowed to have.
"""

import os
import resource
import sys
import time


def watch(event, arguments):
    """Do it before the rename that FAULT_AT names, once."""
    if event != "os.rename" or not str(arguments[1]).endswith(os.environ["FAULT_AT"]):
        return
    mark = os.environ["FAULT_MARK"]
    try:
        os.close(os.open(mark + ".taken", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    with open(mark + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.link(mark + ".new", mark)
    if os.environ["FAULT"] == "starve":
        import torch

        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
        torch.empty(1 << 40, dtype=torch.uint8)
    while os.path.exists(mark):
        time.sleep(0.01)


if "FAULT_AT" in os.environ:
    sys.addaudithook(watch)
