"""Kill -9 at random moments of runs, sweeps and checkpoints: nothing finished is lost, nothing half-written is read.

What comes out in the end is an uninterrupted run's to the bit. Five kills in all; a job of its own with 100 of each:
`BILEVAX_KILLS=100 pytest tests/cli/test_kills.py`. The children are forks of a process that has done the imports; JAX
makes its threads at first use, after the fork.
"""

import json
import os
import subprocess
import sys

import pytest

STUDY = ["-p", "quadratic[dim_x=2,dim_y=2]", "-s", "SOBA", "--seeds", "3", "--max-steps", "20", "--no-plot"]

COMMON = """
import os, pathlib, random, shutil, signal, sys, time, warnings
warnings.simplefilter("ignore")
import bilevel, jax, numpy, problems
from benchmarks.cli import main as cli
from benchmarks.show import compare
from benchmarks.study import files, runner, sweep, tuning
from benchmarks.show import html, report
kills, whole, broken = int(sys.argv[1]), *map(pathlib.Path, sys.argv[2:4])
study, chance = sys.argv[4:], random.Random(int(sys.argv[1]))

def start(folder):
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
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def finish(folder):
    begin = time.monotonic()
    assert os.waitpid(start(folder), 0)[1] == 0
    return time.monotonic() - begin

def kill(length):
    child = start(broken)
    time.sleep(chance.uniform(0, length))
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

finish(whole)
shutil.rmtree(whole)
length = finish(whole)  # the second time with a warm compilation cache, as all the others
"""

STUDIES = """
seen = {}
for _ in range(kills):
    kill(length)
    if (broken / "settings.json").exists():
        report.load(broken)
    now = {path: path.stat().st_mtime_ns for path in broken.glob("cells/*.json")}
    assert seen.items() <= now.items(), (seen, now)
    seen = now
    if len(seen) == len(list(whole.glob("cells/*.json"))):  # nothing is left to kill: begin anew
        shutil.rmtree(broken)
        seen = {}
finish(broken)
assert seen.items() <= {path: path.stat().st_mtime_ns for path in broken.glob("cells/*.json")}.items()
"""

RUN = "def work(folder):\n    cli.app(['run', *study, '--out', str(folder)])\n" + COMMON + STUDIES
SWEEP = "def work(folder):\n    cli.app(['sweep', '--workers', '2', *study, '--out', str(folder)])\n" + COMMON + STUDIES

CHECKPOINT = (
    """
def work(folder):
    jax.config.update("jax_enable_x64", True)
    cli.use_quick_compilation()
    folder.mkdir(exist_ok=True)
    problem = problems.make("quadratic", dim_x=2, dim_y=2, num_samples=8, batch_size=2).problem
    solution = bilevel.solve(
        problem, bilevel.SOBA(), key=jax.random.key(1), max_steps=100, every=2, tol=0.0, progress=False,
        checkpoint=folder / "run.ckpt",
    )
    end = [numpy.asarray(leaf).tobytes().hex() for leaf in (solution.x, solution.y)]
    rows = [{name: value for name, value in row.items() if name != "time"} for row in solution.record.encode()]
    files.write_json(folder / "end.json", {"end": end, "rows": rows})
"""
    + COMMON
    + """
resumed = 0
for _ in range(kills):
    kill(length)
    resumed += (broken / "run.ckpt").exists()
    if (broken / "end.json").exists():  # it had ended: begin anew
        shutil.rmtree(broken)
finish(broken)
assert (whole / "end.json").read_bytes() == (broken / "end.json").read_bytes()
"""
)


def attack(script, kills, tmp_path):
    arguments = [os.environ.get("BILEVAX_KILLS", str(kills)), tmp_path / "whole", tmp_path / "broken", *STUDY]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("script", "kills"), [(RUN, 2), (SWEEP, 1)], ids=["run", "sweep"])
def test_a_killed_study_loses_nothing(script, kills, tmp_path):
    attack(script, kills, tmp_path)
    paths = sorted((tmp_path / "whole/cells").iterdir())
    assert len(paths) == 6
    names = [path.name for path in (tmp_path / "broken/cells").iterdir() if not path.name.startswith(".")]
    assert [path.name for path in paths] == sorted(names)
    for path in paths:
        other = tmp_path / "broken/cells" / path.name
        if path.suffix == ".npz":
            assert path.read_bytes() == other.read_bytes()
            continue
        first, second = (json.loads(p.read_text()) for p in (path, other))
        for row in [*first["record"], *second["record"]]:
            del row["time"]
        assert first["record"] == second["record"]


def test_a_killed_solve_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path):
    attack(CHECKPOINT, 2, tmp_path)
