"""A solve with nothing installed but what `pip install bilevax` brings: all other distributions are hidden.

With an argument, the console command instead, of which they are a part.
"""

import importlib.abc
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

HARD = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf8"))["project"]["dependencies"]


def distribution(requirement):
    """Its name, as one spelling."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def closure(names):
    """With all that these need, extras left out."""
    found, ahead = set(), list(names)
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            try:
                needs = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:  # of another platform or Python
                continue
            ahead += [distribution(need) for need in needs if "extra ==" not in need]
    return found


class Hide(importlib.abc.MetaPathFinder):
    """Finds nothing of the other distributions."""

    def __init__(self, allowed):
        owners = importlib.metadata.packages_distributions()
        self.hidden = {
            module for module, names in owners.items() if not {distribution(name) for name in names} & {*allowed}
        }
        self.hidden -= {"bilevel", "irl", "problems", "benchmarks", *sys.stdlib_module_names}

    def find_spec(self, name, path=None, target=None):
        if name in self.hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


hide = Hide(closure(map(distribution, HARD)))
assert {"typer", "rich", "cvxpy", "flax", "matplotlib", "hypothesis"} <= hide.hidden
assert not {"jax", "numpy", "scipy", "optax", "chex", "safetensors"} & hide.hidden
sys.meta_path.insert(0, hide)


def refusal(call):
    """What a call says of the package that it lacks."""
    try:
        call()
    except ModuleNotFoundError as error:
        return str(error)
    raise AssertionError("it was found")


def use_the_library():
    """Solve, differentiate, print; then ask for what belongs to the extras."""
    import jax
    import jax.numpy as jnp

    import bilevel
    import irl

    problem = bilevel.BilevelProblem(
        upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
        lower=bilevel.Minimize(lambda x, y, batch: jnp.sum((y - x) ** 2)),
        init=lambda key: (jnp.zeros(2), jnp.zeros(2)),
    )
    solution = bilevel.solve(problem, bilevel.SOBA(), key=jax.random.key(0), max_steps=20, every=10)
    assert len(solution.record) == 3, solution
    assert bilevel.hypergradient(problem, solution.x).status == bilevel.Status.ESTIMATED
    print(solution)
    says = '{} is not installed; it comes with: pip install "bilevax[{}]"'
    assert refusal(lambda: bilevel.report.curves(solution.record)) == says.format("rich", "cli")
    network = refusal(lambda: irl.NetworkReward.of(None, jnp.ones((2, 2, 3))))
    assert network == says.format("flax", "irl"), network


if sys.argv[1:]:
    from benchmarks.cli.start import main

    main()
else:
    use_the_library()
