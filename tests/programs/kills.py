"""Kill -9 at random moments: nothing finished is lost, and what comes out is an uninterrupted run's.

    kills.py WORK KILLS WHOLE BROKEN STUDY ...

WORK is run or sweep, `bilevax` on a study, or checkpoint, one `solve` with a checkpoint. It runs once without a kill in
the folder WHOLE, and is killed KILLS times and then finished in BROKEN. The children are forks of this process, which
has done the imports; JAX makes its threads at first use, after the fork.
"""

import os
import pathlib
import random
import shutil
import signal
import sys
import time
import traceback
import warnings

warnings.simplefilter("ignore")

import jax  # noqa: E402
import numpy as np  # noqa: E402

import bilevel  # noqa: E402
import problems  # noqa: E402
from benchmarks.cli import main as cli  # noqa: E402
from benchmarks.show import compare, html, report  # noqa: E402, F401
from benchmarks.study import files, runner, sweep, tuning  # noqa: E402, F401

WORK, KILLS, (WHOLE, BROKEN), STUDY = sys.argv[1], int(sys.argv[2]), map(pathlib.Path, sys.argv[3:5]), sys.argv[5:]
CHANCE = random.Random(KILLS)


def solve(folder):
    """One run with a checkpoint; its end, without times, in end.json."""
    jax.config.update("jax_enable_x64", True)
    cli.use_quick_compilation()
    folder.mkdir(exist_ok=True)
    problem = problems.make("quadratic", dim_x=2, dim_y=2, num_samples=8, batch_size=2).problem
    solution = bilevel.solve(
        problem,
        bilevel.SOBA(),
        key=jax.random.key(1),
        max_steps=100,
        every=2,
        tol=0.0,
        progress=False,
        checkpoint=folder / "run.ckpt",
    )
    end = [np.asarray(leaf).tobytes().hex() for leaf in (solution.x, solution.y)]
    rows = [{name: value for name, value in row.items() if name != "time"} for row in solution.record.encode()]
    files.write_json(folder / "end.json", {"end": end, "rows": rows})


def work(folder):
    """What is killed."""
    if WORK == "checkpoint":
        solve(folder)
    else:
        workers = ["--workers", "2"] if WORK == "sweep" else []
        cli.app([WORK, *workers, *STUDY, "--out", str(folder)])


def start(folder):
    """A process that works; its number."""
    child = os.fork()
    if child:
        return child
    os.setsid()  # its workers are killed with it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        work(folder)
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finish(folder):
    """Work to the end; the seconds that it took."""
    begin = time.monotonic()
    assert os.waitpid(start(folder), 0)[1] == 0
    return time.monotonic() - begin


def kill(length):
    """Work in BROKEN, and be killed within `length` seconds."""
    child = start(BROKEN)
    time.sleep(CHANCE.uniform(0, length))
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def results(folder):
    """The finished cells, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("cells/*.json")}


def kill_studies(length):
    """A cell that is finished stays as it is."""
    seen = {}
    for _ in range(KILLS):
        kill(length)
        if (BROKEN / "settings.json").exists():
            report.load(BROKEN)
        now = results(BROKEN)
        assert seen.items() <= now.items(), (seen, now)
        seen = now
        if len(seen) == len(results(WHOLE)):  # nothing is left to kill: begin anew
            shutil.rmtree(BROKEN)
            seen = {}
    finish(BROKEN)
    assert seen.items() <= results(BROKEN).items()


def kill_solves(length):
    """The end is the same to the bit."""
    for _ in range(KILLS):
        kill(length)
        if (BROKEN / "end.json").exists():  # it had ended: begin anew
            shutil.rmtree(BROKEN)
    finish(BROKEN)
    assert (WHOLE / "end.json").read_bytes() == (BROKEN / "end.json").read_bytes()


if WORK != "sweep":  # whose programs are those of the run, which is killed first
    finish(WHOLE)
    shutil.rmtree(WHOLE)
length = finish(WHOLE)  # with a warm compilation cache, as all the others
(kill_solves if WORK == "checkpoint" else kill_studies)(length)
