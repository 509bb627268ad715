"""The complete files in docs/add-a-*.md: copied, found by discovery, and held to a contract."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import bilevel
import problems
from benchmarks.cli.main import app
from benchmarks.show import solver_tables
from bilevel import solvers
from bilevel.backend.tree import distance
from bilevel.solvers import implicit

DOCS = Path(__file__).parents[1] / "docs"


def copy_skeleton(page: str, folder: Path) -> str:
    """Write the page's titled block to `folder`; its title's file name. What a reader of the page does."""
    title, code = re.search(
        r'^```python title="([^"]+)"\n(.*?)^```$', (DOCS / page).read_text("utf8"), re.MULTILINE | re.DOTALL
    ).groups()
    (folder / Path(title).name).write_text(code, "utf8")
    return title


@pytest.fixture
def skeleton_solver(tmp_path, monkeypatch):
    title = copy_skeleton("add-a-solver.md", tmp_path)
    assert title == "bilevel/solvers/implicit/skeleton.py"
    monkeypatch.setattr(implicit, "__path__", [*implicit.__path__, str(tmp_path)])
    yield solvers.discover(solvers.__name__)["Skeleton"]
    del sys.modules["bilevel.solvers.implicit.skeleton"]


@pytest.fixture
def skeleton_instance(tmp_path, monkeypatch):
    title = copy_skeleton("add-a-problem.md", tmp_path)
    assert title == "problems/skeleton.py"
    monkeypatch.setattr(problems, "__path__", [*problems.__path__, str(tmp_path)])
    problems.families.cache_clear()
    yield problems.make("skeleton", seed=3)
    problems.families.cache_clear()
    del sys.modules["problems.skeleton"]


def test_a_problem_that_is_only_a_file(skeleton_instance):
    problem, truth = skeleton_instance.problem.validate(), skeleton_instance.truth
    data, c = problem.lower_data.full(), problem.upper_data.full()["c"]
    H, M = np.asarray(data["H"]), np.asarray(data["M"])
    np.testing.assert_allclose(np.linalg.eigvalsh(H)[[0, -1]], [1.0, 10.0])

    x = np.array([0.4, -1.0, 2.0])
    h = bilevel.hypergradient(problem, jnp.asarray(x), constants=skeleton_instance.constants)
    exact = M.T @ (M @ x - np.asarray(c)) + 0.1 * x
    assert h.status == bilevel.Status.CONVERGED
    assert np.linalg.norm(h.gradient - exact) <= h.error_bound < 1e-10
    np.testing.assert_allclose(h.value, 0.5 * np.sum((M @ x - np.asarray(c)) ** 2) + 0.05 * x @ x)

    F = bilevel.implicit_objective(problem)
    np.testing.assert_allclose(F(truth.x), truth.value)
    assert F(truth.x + 1e-2) > truth.value
    assert F(truth.x - 1e-2) > truth.value


@pytest.mark.slow
def test_a_solver_that_is_only_a_file(skeleton_solver, skeleton_instance, key):
    problem, truth, solver = skeleton_instance.problem, skeleton_instance.truth, skeleton_solver()
    assert "| `Skeleton` | implicit |" in solver_tables.ideas({"Skeleton": skeleton_solver})
    solution = bilevel.solve(problem, solver, key=key, max_steps=20_000, every=1000, tol=1e-9)
    assert solution.status == bilevel.Status.CONVERGED
    assert distance(solution.x, truth.x) < 1e-7
    assert distance(solution.y, truth.y) < 1e-7
    assert all(jnp.issubdtype(leaf.dtype, jnp.number) for leaf in jax.tree.leaves(solution.state))


@pytest.mark.slow
def test_a_solver_in_a_file_of_ones_own_is_checked(tmp_path):
    title = copy_skeleton("add-a-solver.md", tmp_path)
    shown = CliRunner().invoke(app, ["check-solver", str(tmp_path / Path(title).name), "--json"])
    found = json.loads(shown.stdout)
    assert (shown.exit_code, found["faults"]) == (0, 0)
    lines = {check["name"]: check["found"] for check in found["checks"]}
    assert "CONVERGED" in lines["quadratic: a run"]
    assert "LinearCoupling" in lines["rows"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("x = 1", "got none"), ("x =", "SyntaxError"), ("raise KeyError('mine')", "KeyError"), (None, "a Python file")],
)
def test_a_file_without_a_solver_is_named(tmp_path, text, said):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text, "utf8")
    shown = CliRunner().invoke(app, ["check-solver", str(path)])
    assert shown.exit_code == 2
    assert said in shown.stderr
