"""Draws docs/two-levels.svg, the picture of the first page: python docs/two_levels.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure

import bilevel

jax.config.update("jax_enable_x64", True)
rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "bilevax"})

LEVEL = 0.8  # the bound of y, which gives y(x) its kink
COLORS = {"g": "#9aa5b1", "y": "#3f51b5", "path": "#d9480f"}


def f(x, y, batch):
    """Upper objective: falls along y(x) until the bound, and rises from there on."""
    return (y - 1.0) ** 2 + 0.18 * x


def g(x, y, batch):
    """Lower objective."""
    return 0.5 * (y - 1.2 * jnp.sin(x)) ** 2


problem = bilevel.BilevelProblem(
    upper=f,
    lower=bilevel.Minimize(g),
    x_set=bilevel.Box(-0.6, 2.2),
    y_set=bilevel.Box(-2.0, LEVEL),
    init=lambda key: (jnp.array(-0.5), jnp.array(0.0)),
)


def path():
    """(x, the run's end): the points of a run, one a step."""
    points = []
    solution = bilevel.solve(
        problem,
        bilevel.LBFGS(),
        key=jax.random.key(0),
        max_steps=60,
        every=1,
        throw=True,  # no picture of a run that did not end well
        callback=lambda step, state, row: points.append(float(state.x)),
    )
    return np.array(points), solution


def main():
    """Run, print the report, draw."""
    points, solution = path()
    print(solution)
    xs = np.linspace(-0.6, 2.2, 421)
    solve = jax.jit(jax.vmap(bilevel.solution_map(problem)))
    ys, reached = np.asarray(solve(jnp.asarray(xs))), np.asarray(solve(jnp.asarray(points)))
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = np.linspace(-0.9, 1.2, 201)
    surface = 0.5 * (grid[:, None] - 1.2 * np.sin(xs)) ** 2
    left.contour(xs, grid, surface, levels=[0.02, 0.1, 0.3, 0.7, 1.3, 2.2], colors=COLORS["g"], linewidths=0.7)
    left.axhspan(LEVEL, 1.2, color=COLORS["g"], alpha=0.3, linewidth=0)
    left.plot(xs, ys, color=COLORS["y"], label="y(x)")
    left.plot(points, reached, "o-", color=COLORS["path"], markersize=3, linewidth=0.8, label="a run")
    left.set(xlabel="x", ylabel="y", title="lower level: g and its solution")
    left.legend(loc="lower right", frameon=False)
    right.plot(xs, f(xs, ys, None), color=COLORS["y"], label="F(x) = f(x, y(x))")
    right.plot(points, f(points, reached, None), "o-", color=COLORS["path"], markersize=3, linewidth=0.8)
    right.set(xlabel="x", ylabel="F", title="upper level")
    right.legend(loc="upper right", frameon=False)
    figure.savefig(Path(__file__).with_name("two-levels.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
