"""How good the first of `bilevel.recommend` is, beside every solver that takes the problem.

    python -m benchmarks.experiments.recommended [--making] [--seconds 5] [--steps 2000] [--out FILE] [NAME …]

Every solver runs with its defaults on every instance, from the same key, and is judged by the instance's referee; those
of the families `polyhedral` and `coupled` where the lower level has constraints. F of a run is that of its best point
in good standing (`run.verdicts.rank`): feasible, the lower level solved. F_b is the least of all runs that end well,
or the known optimum, where inexact feasibility led below it; F_0 is F at the start; the best solver is that whose F
is the nearest to F_b, of several within 1e-6 the cheapest. Of the recommended solver's run:

    as good   F <= F_b + 0.01 |F_b| + 1e-4 |F_0 - F_b|, up to rounding: aim 95 % of the instances
    cheap     its oracle calls until it is as good, in passes over the data, are at most twice those of the best solver
              until that is as good: aim 80 %
    well      it ends with CONVERGED, WEAKLY_ACTIVE or GOLDSTEIN, or at a limit: aim 100 %, where any solver ends well

Beside "cheap" stands the same against the solver that is the cheapest there, which nobody knows beforehand. Branch and
bound, whose programs are solved on the host, has no count and is left out of both; what `init` calls is not counted.

`MAKING` are the instances on which the rules were made, `HELD_BACK` those on which they are judged. Both lists were
written before the first rule, and nobody looked at runs of the second before the rules were finished. Calls of solvers
whose number is not known before are counted as they run (`oracles.counting_runs`); a formed Hessian of n unknowns
counts n.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bilevel
import problems
from benchmarks.peers import exact
from benchmarks.study.compilation import use_quick_compilation
from benchmarks.study.registry import parse
from bilevel import oracles
from bilevel.diagnostics import IMPLICIT, REDUCED
from bilevel.run.verdicts import rank
from problems.instance import Instance

MAKING_SEEDS, HELD_SEEDS = (0, 1), (100, 101)
MAKING = (
    "quadratic",
    "quadratic[num_samples=64,batch_size=8]",
    "ridge",
    "logistic[train=200,val=200]",
    "constrained[kind=random]",
    "constrained[kind=kink]",
    "constrained[kind=quadratic14]",
    "coupled",
    "nonconvex[case=mb_3_19]",
    "nonconvex[case=mb_3_16]",
    "nonconvex_scaled[case=bvfsm,n=2]",
    "nonconvex_scaled[case=bome_degenerate]",
    "nonconvex_scaled[case=lvhba_llc]",
    "gridworld[size=3,trajectories=20]",
    "own[case=contraction]",
    "own[case=leader_rows]",
    "own[case=tiny_network]",
)
HELD_BACK = (  # constrained[kind=ridge] was among them: BranchAndBound proved that its F is unbounded from below
    "quadratic[coupling=2.0]",
    "quadratic[dim_x=5,dim_y=40,condition_y=100.0]",
    "quadratic[num_samples=100,batch_size=10,dim_y=20]",
    "ridge[train=100]",
    "constrained[kind=toy]",
    "constrained[kind=random,dim=20,rows=8,weak=1]",
    "coupled[kind=qp,dim_x=2,dim_y=3]",
    "coupled[kind=concave,dim_x=1,dim_y=1]",
    "nonconvex[case=mb_3_11]",
    "nonconvex[case=mb_3_13]",
    "nonconvex[case=mb_3_15]",
    "nonconvex[case=mb_3_17]",
    "nonconvex[case=mb_3_18]",
    "nonconvex[case=ka_ex3]",
    "nonconvex[case=blocc_1]",
    "nonconvex[case=mb_3_22]",
    "nonconvex_scaled[case=rastrigin,n=2]",
    "nonconvex_scaled[case=bicgaffa]",
    "objectworld[size=4,objects=4,model=linear]",
    "own[case=cancer]",
    "own[case=simplex]",
    "own[case=leader_sum]",
    "own[case=small_network]",
    "hyper_cleaning[corruption=0.3,train=300]",
    "logistic[penalties=feature,train=150,val=150]",
)


def matched(x, y, batch):
    """|y - 1|^2 + |x|^2/10, shape []."""
    return jnp.sum((y - 1) ** 2) + 0.1 * jnp.sum(x**2)


def pulled(x, y, batch):
    """A contraction of y for matrices `batch` of norm 1."""
    return 0.5 * jnp.tanh(batch @ y) + jnp.concatenate([x, x, x])


def near(x, y, batch):
    """|y - batch x|^2/2 + |y|^4/40: strongly convex in y, not quadratic."""
    return 0.5 * jnp.sum((y - batch @ x) ** 2) + jnp.sum(y**4) / 40


def layer(x, y, batch):
    """Mean squared error of a network of four tanh units with weights y, a penalty exp(x_i) on each part of them."""
    Z, t = batch
    hidden = jnp.tanh(Z @ y["in"])
    return (
        jnp.mean((hidden @ y["out"] - t) ** 2)
        + jnp.exp(x[0]) * jnp.sum(y["in"] ** 2)
        + jnp.exp(x[1]) * jnp.sum(y["out"] ** 2)
    )


def loss(x, y, batch):
    """The same without penalties."""
    Z, t = batch
    return jnp.mean((jnp.tanh(Z @ y["in"]) @ y["out"] - t) ** 2)


def shallow(x, y, batch):
    """Mean squared error of three softplus units with weights y [2, 3]; x: weights exp(x_i) of the samples."""
    Z, t = batch
    return jnp.mean(jnp.exp(x) * (jnp.sum(jax.nn.softplus(Z @ y), axis=1) - t) ** 2) + 1e-3 * jnp.sum(y**2)


def unweighted(x, y, batch):
    """The same without weights, and a little of |x|^2."""
    Z, t = batch
    return jnp.mean((jnp.sum(jax.nn.softplus(Z @ y), axis=1) - t) ** 2) + 1e-3 * jnp.mean(x**2)


def ahead(x, y):
    """Two rows of the leader: y_0 >= 0.2, |x|^2 <= 1."""
    return jnp.stack([0.2 - y[0], jnp.sum(x**2) - 1])


def total(x, y):
    """One row of the leader: the sum of y is 1."""
    return jnp.sum(y)[None] - 1


def own(case: str, seed: int) -> Instance:
    """Instances of this file: what `problems` has no family for."""
    key = jax.random.key(seed)
    start = functools.partial(_start, seed)
    if case == "cancer":
        return Instance(exact.make(seed))
    if case == "contraction":
        matrix = bilevel.Full(jax.random.orthogonal(key, 12))
        return Instance(bilevel.BilevelProblem(matched, bilevel.FixedPoint(pulled), lower_data=matrix, init=_four))
    if case == "tiny_network":
        Z, noise = jax.random.normal(key, (40, 2)), jax.random.normal(jax.random.key(seed + 1), (40,))
        t = jnp.abs(Z[:, 0]) + jnp.where(jnp.arange(40) < 10, 3 * noise, 0.1 * noise)  # a quarter is noise
        data = [bilevel.Full((Z[part], t[part])) for part in (slice(0, 20), slice(20, 40))]
        problem = bilevel.BilevelProblem(
            unweighted, bilevel.Minimize(shallow), lower_data=data[0], upper_data=data[1], init=_weights
        )
        return Instance(problem)
    if case == "small_network":
        Z, noise = jax.random.normal(key, (60, 3)), jax.random.normal(jax.random.key(seed + 1), (60,))
        t = jnp.sin(2 * Z[:, 0]) + Z[:, 1] + 0.3 * noise
        data = [bilevel.Full((Z[part], t[part])) for part in (slice(0, 30), slice(30, 60))]
        box = bilevel.Box(-8.0, 2.0)
        problem = bilevel.BilevelProblem(
            loss, bilevel.Minimize(layer), box, lower_data=data[0], upper_data=data[1], init=start
        )
        return Instance(problem)
    matrix = bilevel.Full(jax.random.normal(key, (6, 4)))
    rows = {"leader_rows": {"inequality": ahead}, "leader_sum": {"equality": total}}.get(case)
    limits = None if rows is None else bilevel.UpperConstraints(**rows)
    y_set = bilevel.Simplex() if case == "simplex" else bilevel.Reals()
    problem = bilevel.BilevelProblem(
        matched, bilevel.Minimize(near), y_set=y_set, lower_data=matrix, init=_six, upper_constraints=limits
    )
    return Instance(problem, referee=IMPLICIT if limits is None else REDUCED)


def _four(key):
    return jnp.full(4, 0.1), jnp.zeros(12)


def _weights(key):
    return jnp.zeros(20), 0.5 * jax.random.normal(key, (2, 3))


def _six(key):
    return jnp.full(4, 0.1), jnp.full(6, 1 / 6)


def _start(seed, key):
    drawn = jax.random.split(jax.random.key(seed + 7))
    y = {"in": 0.5 * jax.random.normal(drawn[0], (3, 4)), "out": 0.5 * jax.random.normal(drawn[1], (4,))}
    return jnp.full(2, -3.0), y


def instance(name: str, seed: int) -> Instance:
    """The instance of a name of the lists."""
    family, settings = parse(name)
    return own(settings["case"], seed) if family == "own" else problems.make(family, seed=seed, **settings)


ENDS_WELL = {"CONVERGED", "WEAKLY_ACTIVE", "GOLDSTEIN", "MAX_STEPS", "TIME_LIMIT", "UNCONFIRMED"}
SHORT, LONG, ADAPTIVE = (40, 2), 40, (400, 2)  # (steps, every) of a first run, every of a long one, (steps, every)
TIE, ROUNDING = 1e-6, 1e-9  # of two F, in parts of |F_b| + |F_0 - F_b|; of an F_b that is 0
_calls: dict[str, int] = {}


class Point(NamedTuple):
    """A measurement: F, None where the point is not in good standing, and oracle calls so far, in passes."""

    value: float | None
    passes: float


class Run(NamedTuple):
    """A run."""

    solver: str
    status: str  # or the exception's name
    value: float | None  # F of the best point in good standing
    path: list[Point]

    @property
    def well(self) -> bool:
        """Whether it ended well, with an F."""
        return self.status in ENDS_WELL and self.value is not None

    def passes_to(self, target: float) -> float:
        """Calls until F <= target; infinite where it never was."""
        return next((p.passes for p in self.path if p.value is not None and p.value <= target), math.inf)


@functools.cache
def counted(kind: type[bilevel.Solver]) -> type[bilevel.Solver]:
    """The solver with the calls of its steps counted as they run."""

    def step(self: Any, problem: bilevel.BilevelProblem, state: Any, key: jax.Array) -> Any:
        with oracles.counting_runs(_calls):
            return kind.step(self, problem, state, key)

    return bilevel.struct.struct(kw_only=True)(type(kind.__name__, (kind,), {"step": step}))


def run(example: Instance, kind: type[bilevel.Solver], seed: int, steps: int, seconds: float) -> Run:
    """Run a solver's defaults."""
    solver, path = (counted(kind) if kind.adaptive else kind)(), []

    def seen(step: int, state: Any, row: bilevel.Row) -> None:
        jax.effects_barrier()
        calls = bilevel.OracleCount(**_calls).passes(1.0, 1.0) if kind.adaptive else row["oracles"]
        path.append((row, calls))

    plans = [ADAPTIVE] if kind.adaptive else [SHORT, (steps, LONG)]
    solution = None
    for limit, every in plans:
        _calls.clear()
        try:
            solution = bilevel.solve(
                example.problem, solver, key=jax.random.key(seed), max_steps=limit, every=every, time_limit=seconds,
                callback=seen, measure=example.referee, progress=False,
            )  # fmt: skip
        except Exception as error:
            return Run(kind.__name__, type(error).__name__, None, [])
    assert solution is not None
    assert solution.best is not None
    default = example.referee.default_tol(solution.x)

    def value(row: bilevel.Row) -> float | None:
        doubtful, outside, F = rank(row, default, example.referee.at_y)
        return None if doubtful or outside > 0 else F

    points = [Point(value(row), calls) for row, calls in path]
    return Run(kind.__name__, solution.status.name, value(solution.best.row), points)


def suited(kind: type[bilevel.Solver], problem: bilevel.BilevelProblem) -> bool:
    """Whether the solver is compared: it takes the problem, and is not for constraints that the lower level has not."""
    family = kind.__module__.split(".")[2]
    for_others = family in ("coupled", "polyhedral") and not problem.constrained_lower
    return not for_others and bilevel.solver.refusal(kind(), problem) is None


def study(names: list[str], seeds: tuple[int, ...], steps: int, seconds: float, out: Path) -> dict[str, Any]:
    """All runs on the instances; kept in `out` as they come, so that a broken study goes on with what is left."""
    found = json.loads(out.read_text()) if out.exists() else {}
    for name in names:
        for seed in seeds:
            label = f"{name} {seed}"
            example, begin, done = instance(name, seed), time.perf_counter(), found.setdefault(label, [])
            left = set(bilevel.solvers.ALL) - {made["solver"] for made in done}
            runs = []
            for kind in (bilevel.solvers.ALL[solver] for solver in sorted(left)):
                if suited(kind, example.problem):
                    runs.append(run(example, kind, seed, steps, seconds)._asdict())
            found[label] = done + runs
            saved = out.with_suffix(".part")
            saved.write_text(json.dumps(found))
            saved.replace(out)
            print(f"{label}: {len(runs)} solvers, {time.perf_counter() - begin:.0f} s", flush=True)
    return found


class Verdict(NamedTuple):
    """How the recommended solver did on an instance."""

    solver: str
    """The one recommended."""
    status: str
    value: float | None
    """F of its run."""
    least: float | None  # F_b; None where no solver ends well
    best: str
    """The best solver, and the one that is the cheapest to be as good."""
    cheapest: str
    good: bool
    over_best: float  # its passes over the best solver's; infinite where it is not as good, NaN without a count
    over_cheapest: float
    well: bool


def judge(example: Instance, runs: list[Run]) -> Verdict:
    """Hold the first of `bilevel.recommend` against all runs on an instance."""
    first = bilevel.recommend(example.problem)[0].name
    mine = next(run for run in runs if run.solver == first)
    ended = {run.solver: run for run in runs if run.well}
    if not ended:
        return Verdict(first, mine.status, mine.value, None, "", "", True, 1.0, 1.0, True)
    values = {name: run.value for name, run in ended.items() if run.value is not None}
    least = min(values.values())
    if example.truth is not None:
        least = max(least, example.truth.value)
    start = next((run.path[0].value for run in runs if run.path), None)
    target = least + 0.01 * abs(least) + 1e-4 * (0 if start is None else abs(start - least)) + ROUNDING
    passes = {name: run.passes_to(target) for name, run in ended.items() if run.path[-1].passes > 0}
    cheapest = min(passes, key=lambda name: passes[name], default="")
    miss = {name: abs(value - least) for name, value in values.items()}
    same = min(miss.values()) + TIE * (abs(least) + abs((start or least) - least))
    best = min((name for name in passes if miss[name] <= same), key=lambda name: passes[name], default="")
    good = first in values and values[first] <= target
    own = passes.get(first, math.nan) if good else math.inf
    by_best, by_cheapest = (own / max(passes.get(name, math.nan), 1) for name in (best, cheapest))
    return Verdict(first, mine.status, mine.value, least, best, cheapest, good, by_best, by_cheapest,
                   mine.status in ENDS_WELL)  # fmt: skip


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """The table and the figures."""
    table = Table(title="the first of bilevel.recommend beside every solver")
    for column in ("instance", "recommended", "ends", "F", "F_b", "best", "x passes", "cheapest", "x passes"):
        table.add_column(column, overflow="fold")
    verdicts = []
    for label, made in found.items():
        name, _, seed = label.rpartition(" ")
        runs = [Run(**{**run, "path": [Point(*point) for point in run["path"]]}) for run in made]
        v = judge(instance(name, int(seed)), runs)
        verdicts.append(v)
        number = lambda value: "-" if value is None else f"{value:.6g}"  # noqa: E731
        value = number(v.value) + ("" if v.good else " !")
        over = [f"{ratio:.2g}" for ratio in (v.over_best, v.over_cheapest)]
        table.add_row(escape(label), v.solver, v.status, value, number(v.least), v.best, over[0], v.cheapest, over[1])
    Console(width=160).print(table)
    told = [v for v in verdicts if not math.isnan(v.over_best)]
    cheap, hindsight = (sum(getattr(v, name) <= 2 for v in told) for name in ("over_best", "over_cheapest"))
    good, well, n = sum(v.good for v in verdicts), sum(v.well for v in verdicts), len(verdicts)
    share = lambda count, of: f"{count} ({count / max(of, 1):.0%})"  # noqa: E731
    print(f"of {n} instances: as good {share(good, n)}, ends well {share(well, n)}")
    print(
        f"of {len(told)} with a count: cheap {share(cheap, len(told))}, of the cheapest {share(hindsight, len(told))}"
    )


def main() -> None:
    """Read the arguments, run and print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="Instances of the list; default all of it.")
    parser.add_argument("--making", action="store_true", help="The instances on which the rules were made.")
    parser.add_argument("--steps", type=int, default=2000, help="At most, of a solver of known cost; 400 of others.")
    parser.add_argument("--seconds", type=float, default=5.0, help="Of solver time for a run.")
    parser.add_argument("--out", type=Path, default=Path("recommended.json"), help="Where runs are kept.")
    given = parser.parse_args()
    use_quick_compilation()
    jax.config.update("jax_enable_x64", True)
    names, seeds = (MAKING, MAKING_SEEDS) if given.making else (HELD_BACK, HELD_SEEDS)
    show(study(given.names or list(names), seeds, given.steps, given.seconds, given.out))


if __name__ == "__main__":
    main()
