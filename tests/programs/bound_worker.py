"""A worker that takes a share of the cores and ends with its parent: bound_worker.py FOLDER CORE ..."""

import os
import pathlib
import sys
import time

from benchmarks.study import sweep

sweep.end_with(os.getppid())
place = sweep.Place(None, 64, None, pathlib.Path(sys.argv[1]), tuple((int(core),) for core in sys.argv[2:]))
sweep.take_share(place)
print({tuple(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}, flush=True)
sweep.end_with(-1)  # no such parent
time.sleep(60)
