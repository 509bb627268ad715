"""Run a study's cells in parallel: processes of this machine or Ray's by joblib, or a cluster of Dask's.

A cell is a function of its text and seed, written by the process that ran it into a file of its own, so it does not
matter which worker runs it or in which order: the results are those of `bilevax run`, bit for bit. For that a worker's
thread pools are as wide as those of `bilevax run`, because their width decides how long sums are split; what a worker
gets is its share of the cores, on which all its threads run. (Where the system cannot bind threads to cores, they
compete.)

When a worker dies, the pool is lost: a new one runs what is not finished. After `BREAKS` lost pools the rest runs
one cell at a time; a cell that kills its worker once more becomes a row with that reason.
"""

import dataclasses
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import joblib
from filelock import FileLock, Timeout

from benchmarks.errors import UsageError
from benchmarks.study.compilation import keep_programs
from benchmarks.study.files import EMPTY, ERROR, cell_path, read_cell, write_json
from benchmarks.study.registry import Cell
from benchmarks.study.runner import Held, execute, run_cell, unfinished

BREAKS = 3
ORPHANED = 3  # exit code of a worker whose parent has ended
LOCAL = "loky"
BACKENDS = (LOCAL, "dask", "ray")
PREFIX, OWNER = "bilevax-", "owner"  # of temporary folders, and the file in each that its process locks


class Place(NamedTuple):
    """What a worker must know: folder, precision, compilation cache; on this machine where shares of the cores are
    taken, the shares, and the process whose end is the worker's; XLA's flags, by which it compiles to the same bits.
    """

    folder: Path
    precision: int
    cache: str | None
    slots: Path | None = None
    shares: tuple[tuple[int, ...], ...] = ()
    parent: int | None = None
    flags: str = ""


def cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shares(available: list[int], workers: int) -> tuple[tuple[int, ...], ...]:
    """The cores of each worker: disjoint, sizes differ by one at most; one core each where workers are more."""
    if workers >= len(available):
        return tuple((available[k % len(available)],) for k in range(workers))
    return tuple(tuple(available[k::workers]) for k in range(workers))


_own = threading.local()  # of a worker: some backends run a worker's cells in threads
_taken: dict[Path, FileLock | None] = {}


def task(place: Place, index: int, cell: Cell) -> int:
    """Run one cell in a worker; return its number."""
    if _finished(place.folder, index, cell):  # a cluster that has lost what a worker answered asks once more
        return index
    if place.cache is not None:
        keep_programs(place.cache)
    if place.flags:  # a cluster's workers have not inherited them; XLA starts with the first cell
        os.environ["XLA_FLAGS"] = place.flags
    if place.slots is not None and place.slots not in _taken:  # this process's first cell
        _taken[place.slots] = None
        end_with(place.parent)
        take_share(place)
    with jax.enable_x64(place.precision == 64):
        key = place.folder, place.precision
        if getattr(_own, "key", None) != key:
            _own.key, _own.held = key, Held()
        run_cell(place.folder, index, cell, _own.held)
    return index


def end_with(parent: int | None) -> None:
    """End this process within a second of its parent's end: a killed sweep's workers would wait for minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(ORPHANED)

    if hasattr(os, "getppid") and parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def take_share(place: Place) -> None:
    """Bind all threads of this process to a share of the cores that no living worker has; once."""
    if place.slots is None or not hasattr(os, "sched_setaffinity"):
        return
    jax.devices()  # now, before fewer cores are seen: the pools are made as wide as in `bilevax run`
    for k, share in enumerate(place.shares):
        lock = FileLock(place.slots / str(k), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        _taken[place.slots] = lock  # the system takes it back when this worker dies
        for thread in Path("/proc/self/task").iterdir():
            try:
                os.sched_setaffinity(int(thread.name), share)
            except ProcessLookupError:  # it has just ended
                continue
        return


def sweep(
    folder: Path,
    cells: list[Cell],
    on_cell: Callable[[int, Cell], None],
    *,
    precision: int = 64,
    workers: int | None = None,
    backend: str = LOCAL,
    scheduler: str | None = None,
) -> bool:
    """Run every cell that is not finished in `folder`, many at a time; true when all were run, false after Ctrl-C.

    Args:
        folder: opened by `files.open_folder`; of a cluster, on a file system that all its machines share.
        cells: of the run.
        on_cell: called with (how many are done, the cell) as cells end.
        precision: 64 or 32.
        workers: processes; None: the cores, or what the cluster has.
        backend: "loky" for processes of this machine, "dask" or "ray" for a cluster.
        scheduler: the cluster's address; None lets dask or ray start a local one.

    Raises:
        UsageError: a backend that is unknown or not installed.
        FolderError: a result that is there is damaged, or one cannot be written.
    """
    if workers is None:
        workers = len(cores()) if scheduler is None else -1
    if backend == LOCAL and workers == 1:
        return execute(folder, cells, on_cell)
    todo = unfinished(folder, cells)
    total, lost = len(cells) - len(todo), 0
    with own_folder() as slots, _pool(backend, scheduler, workers) as died:
        flags = os.environ.get("XLA_FLAGS", "")
        place = Place(folder.resolve(), precision, _cache(), flags=flags)
        if backend == LOCAL:
            place = place._replace(slots=slots, shares=shares(cores(), workers), parent=os.getpid())
        while todo:
            alone = lost >= BREAKS
            batch = todo[:1] if alone else list(todo)
            try:
                for index in _results(place, cells, batch, workers, backend):
                    todo.remove(index)
                    total += 1
                    on_cell(total, cells[index])
            except KeyboardInterrupt:
                return False
            except died:
                lost += 1
                todo = [index for index in todo if not _finished(folder, index, cells[index])]
                if alone and batch[0] in todo:
                    _write_death(folder, batch[0], cells[batch[0]])
                    todo.remove(batch[0])
                total = len(cells) - len(todo)
    return True


@contextmanager
def own_folder() -> Iterator[Path]:
    """A temporary folder while it is open. Those of killed processes are removed: nobody holds the lock in them."""
    for other in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{OWNER}"):
        with suppress(OSError, Timeout), FileLock(other, timeout=0):
            shutil.rmtree(other.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder, FileLock(Path(folder) / OWNER):
        yield Path(folder)


def _cache() -> str | None:
    """The folder of compiled programs that is set."""
    config: Any = jax.config  # whose stubs do not know this one
    return config.jax_compilation_cache_dir


def _results(place: Place, cells: list[Cell], batch: list[int], workers: int, backend: str) -> Iterator[int]:
    """The numbers of the cells of `batch` as they end."""
    if backend == "dask":  # by its own client: joblib 1.6 waits for ever for a task that dask has given up
        from dask.distributed import as_completed, get_client

        futures = [get_client().submit(task, place, index, cells[index], pure=False) for index in batch]
        yield from (future.result() for future in as_completed(futures))
        return
    tasks = (joblib.delayed(task)(place, index, cells[index]) for index in batch)
    limits = {"inner_max_num_threads": len(cores())} if backend == LOCAL else {}  # joblib's own limit changes sums
    with joblib.parallel_config(backend=backend, **limits), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)  # loky renews large ones
        how = "generator_unordered" if backend == LOCAL else "list"
        settings: dict[str, Any] = {"n_jobs": workers, "batch_size": 1, "return_as": how}
        ended: Any = joblib.Parallel(**settings)(tasks)
        yield from ended


def _finished(folder: Path, index: int, cell: Cell) -> bool:
    result = read_cell(folder, index, cell)
    return result is not None and result["status"] != ERROR


def _write_death(folder: Path, index: int, cell: Cell) -> None:
    reason = "the worker process died each time: killed, or out of memory. Run it alone with `bilevax run`."
    write_json(
        cell_path(folder, index, cell), {"cell": dataclasses.asdict(cell)} | EMPTY | {"status": ERROR, "reason": reason}
    )


@contextmanager
def _pool(backend: str, scheduler: str | None, workers: int) -> Iterator[type[Exception]]:
    """Connect joblib with the cluster; give what it raises where a worker died; end the local processes afterwards."""
    if backend not in BACKENDS:
        raise UsageError(f"--backend: got {backend!r}; expected {', '.join(BACKENDS)}.")
    if backend == LOCAL and scheduler is not None:
        raise UsageError("--scheduler: it is the address of a cluster; name its --backend: dask or ray.")
    client: Any = None
    died: Any = BrokenProcessPool
    try:
        if backend == "dask":
            from dask.distributed import Client, KilledWorker

            own: dict[str, Any] = {} if scheduler else {"n_workers": workers, "threads_per_worker": 1}
            died, client = KilledWorker, Client(scheduler, **own)  # dask has tried some times before it says so
        elif backend == "ray":
            import ray
            from ray.util.joblib import register_ray

            ray.init(address=scheduler, log_to_driver=False)  # or workers' lines get between those of --json
            register_ray()
            died = ray.exceptions.RayActorError
    except ImportError as error:
        raise UsageError(f"--backend {backend}: {error}. Install it: pip install bilevax[{backend}].") from error
    except OSError as error:
        raise UsageError(f"--scheduler {scheduler}: no answer ({error}). Is the cluster there?") from error
    try:
        yield died
    finally:
        if backend == LOCAL:
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True, kill_workers=True)
        elif client is not None:
            client.close()
