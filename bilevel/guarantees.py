"""Executable theorems: a claim with its explicit bound, and a search that tries to break it.

A `Guarantee` says: for every instance that fulfils the assumptions, measure(instance, horizon) <= bound(constants, k)
at each k of the horizon. `search` draws instances with Hypothesis, steers the draws towards a large quotient of what is
measured and its bound by `hypothesis.target`, and shrinks what breaks the claim to a few simple numbers. That a search
finds nothing is evidence, not a proof.

An instance is a pytree with a field `constants`, itself a pytree: everything that the bound may use. The strategy
`Guarantee.instances` best draws `Recipe`s: a traced function with a seed and a few numbers for its arguments. One
compilation then serves all draws, and each draw is checked at many seeds by `vmap`. A strategy that draws finished
instances works as well, one by one.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.backend.extras import extra
from bilevel.diagnostics import fit_rate
from bilevel.run import advance
from bilevel.solver import Solver
from bilevel.struct import invalid

PyTree = Any
LANES = 64
SLACK = 1e-9  # relative, for rounding in the bound itself


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make an instance."""

    build: Callable[..., Any]
    """build(key, **numbers) -> instance: pure, and traced."""
    seed: int
    """The key is `jax.random.key(seed)`."""
    numbers: Mapping[str, float]
    """The other arguments by name."""

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={value!r}" for name, value in self.numbers.items())
        return f"{self.build.__name__}(seed={self.seed}, {numbers})"

    def instance(self) -> Any:
        """The instance itself."""
        return self.build(jax.random.key(self.seed), **_arrays(self.numbers))


def _arrays(numbers: Mapping[str, float]) -> dict[str, Array]:
    return {name: jnp.asarray(value, type(value)) for name, value in numbers.items()}


class Trial(NamedTuple):
    """What one instance gave, or many of them, with a leading axis [lanes]."""

    measured: Array
    """What the guarantee's `measure` returned, shape [horizon, …]."""
    bound: Array
    """The bound of each of these numbers, same shape."""
    allowance: Array
    """What rounding may add to a measured number, shape []."""
    margins: dict[str, Array]
    """The margin of each assumption by its name, shape []: negative where it does not hold."""


@dataclasses.dataclass(frozen=True, eq=False)
class Guarantee:
    """A theorem that can be executed.

    Attributes:
        name: a word or two, by which `bilevax verify` is asked for it.
        source: paper and theorem; or "ours", with the place of the proof.
        assumptions: functions of an instance, each with a margin [] that is >= 0 where the assumption holds;
            `bilevel.theory.assumptions` has the usual ones.
        instances: a Hypothesis strategy of `Recipe`s, or of instances.
        measure: measure(instance, horizon) -> [len(horizon), …], pure and traced.
        bound: bound(constants, k) -> […]: what the row of `measure` for this k must not exceed.
        horizon: the values of k to look at, increasing whole numbers >= 0.
        rounding: rounding(constants) -> []: what floating point may add to a measured value.
        statement: one line that says what is measured and what bounds it.
        rate: "geometric" where the measured values fall like q^k, "power" where like k^p, "" where k is no time.
        lanes: how many instances of a recipe are tried at once; fewer where measuring takes long.

    Raises:
        InvalidInput: for a horizon or a rate that is none of these.
    """

    name: str
    source: str
    assumptions: tuple[Callable[[Any], Array], ...]
    instances: Any
    measure: Callable[[Any, tuple[int, ...]], Array]
    bound: Callable[[Any, int], Array]
    horizon: tuple[int, ...]
    rounding: Callable[[Any], Any]
    statement: str = ""
    rate: str = ""
    lanes: int = LANES

    def __post_init__(self) -> None:
        """Check the horizon and the kind of rate."""
        if not self.horizon or any(k < 0 for k in self.horizon) or list(self.horizon) != sorted(set(self.horizon)):
            invalid("horizon (Guarantee)", self.horizon, "increasing whole numbers >= 0", "Give the k's to look at.")
        if self.rate not in ("", "geometric", "power"):
            invalid("rate (Guarantee)", repr(self.rate), "'geometric', 'power' or ''", "Leave it out without a rate.")

    def margins(self, instance: Any) -> dict[str, Array]:
        """The margin of each assumption by the name of its function; pure."""
        return {check.__name__: jnp.asarray(check(instance), float) for check in self.assumptions}

    def trial(self, instance: Any, margins: dict[str, Array]) -> Trial:
        """Measure one instance and work out its bound; pure.

        Raises:
            InvalidInput: where `measure` and `bound` differ in shape.
        """
        measured = self.measure(instance, self.horizon)
        bound = jnp.stack([jnp.asarray(self.bound(instance.constants, k), float) for k in self.horizon])
        if measured.shape != bound.shape:
            do = "Return one row per k of the horizon, and the same columns from both."
            invalid(f"measure ({self.name})", f"shape {measured.shape}", f"the bound's shape {bound.shape}", do)
        return Trial(measured, bound, jnp.asarray(self.rounding(instance.constants), float), margins)

    def try_on(self, drawn: Any, lanes: int | None = None) -> Trial:
        """Trials of a recipe at the seeds seed, …, seed + lanes - 1, or of one finished instance, as NumPy arrays.

        Every array has a leading axis [lanes], of length one for an instance. By default as many as `self.lanes`.
        """
        lanes = self.lanes if lanes is None else lanes
        if isinstance(drawn, Recipe):
            trial = _many(self, drawn.build, jnp.arange(lanes) + drawn.seed, _arrays(drawn.numbers))
        else:
            trial = jax.tree.map(lambda leaf: leaf[None], _one(self, drawn))
        return jax.tree.map(np.asarray, trial)


@partial(jax.jit, static_argnums=(0, 1))
def _many(guarantee: Guarantee, build: Callable, seeds: Array, numbers: dict[str, Array]) -> Trial:
    def make(seed: Array) -> tuple[Any, dict[str, Array]]:
        instance = build(jax.random.key(seed), **numbers)
        return instance, guarantee.margins(instance)

    # One by one, for a batch of LAPACK calls that do not depend on each other (singular values, in most builds) can
    # deadlock jaxlib's pool of two threads. Measuring, which takes the time, is vectorised.
    instances, margins = jax.lax.map(make, seeds)
    return jax.vmap(guarantee.trial)(instances, margins)


@partial(jax.jit, static_argnums=0)
def _one(guarantee: Guarantee, instance: Any) -> Trial:
    return guarantee.trial(instance, guarantee.margins(instance))


def ratios(trial: Trial) -> np.ndarray:
    """How close each lane comes to its bound at each k: measured/(bound + allowance), shape [lanes, horizon].

    It is the largest over further axes, and infinite where something is NaN: above one the claim is broken.
    """
    measured, bound, allowance = np.asarray(trial.measured), np.asarray(trial.bound), np.asarray(trial.allowance)
    allowed = bound + allowance.reshape(-1, *[1] * (bound.ndim - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(measured <= 0, 0.0, measured / allowed)
    ratio = np.where(np.isnan(measured) | np.isnan(ratio), np.inf, ratio)
    return ratio.reshape(*ratio.shape[:2], -1).max(axis=-1)


@dataclasses.dataclass(frozen=True)
class Path:
    """One instance against its bound."""

    drawn: Any
    """What was drawn. A recipe has the seed of this very instance."""
    horizon: tuple[int, ...]
    """The values of k."""
    ratio: np.ndarray
    """See `ratios`, shape [horizon]: the largest over all components at each k."""
    measured: np.ndarray
    """The measured values of the component with the largest ratio of all, shape [horizon]."""
    bound: np.ndarray
    """The bounds of that component, shape [horizon]."""
    allowance: float
    """What rounding may add to a measured value."""

    @property
    def worst(self) -> float:
        """The largest ratio on the path."""
        return float(self.ratio.max())

    def fit(self, rate: str, of_bound: bool = False) -> tuple[float, float] | None:
        """(rate, half-width of its 95% interval) of the measured values, or of their bounds.

        The rate is q of q^k ("geometric") or p of k^p ("power"). None where no rate is asked for, or where fewer than
        three values are clear of rounding.
        """
        values, k = self.bound if of_bound else self.measured, np.asarray(self.horizon, float)
        clear = (values > 30 * self.allowance) & (values > 0) & np.isfinite(values) & (k > 0)
        if not rate or clear.sum() < 3:
            return None
        if rate == "power":
            return fit_rate(k[clear], values[clear])
        slope, half = fit_rate(np.exp(k[clear] / k[-1]), values[clear])  # log values against k/k[-1]
        q = math.exp(slope / k[-1])
        return q, q * math.expm1(half / k[-1])


@dataclasses.dataclass(frozen=True)
class Counterexample:
    """What breaks a claim, after shrinking."""

    path: Path
    """The instance against its bound."""
    broken: str
    """"bound", or the name of an assumption that the instance does not fulfil."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a search found."""

    guarantee: Guarantee
    """The claim."""
    draws: int
    """How many draws of Hypothesis were tried."""
    instances: int
    """How many instances they were, several for each recipe."""
    tightest: Path | None
    """The path with the largest ratio; None where nothing was tried."""
    steady: Path | None
    """The path with the largest ratio at its last k, to fit a rate to: the tightest may be so at k = 1 only."""
    counterexample: Counterexample | None
    """What breaks the claim, or None."""
    seconds: float
    """How long the search took."""

    @property
    def verdict(self) -> str:
        """In words: "holds", "broken", "bad instances" or "not tried".

        Bad instances do not fulfil an assumption: the strategy that draws them is wrong, and the claim was not tested.
        """
        if self.counterexample is not None:
            return "broken" if self.counterexample.broken == "bound" else "bad instances"
        return "holds" if self.instances else "not tried"


class _Broken(Exception):
    """Ends a draw that breaks the claim, for Hypothesis to shrink."""


def ended(trial: Trial) -> np.ndarray:
    """Whether each lane's last values are all clear of rounding, shape [lanes]."""
    last, allowance = np.asarray(trial.measured)[:, -1], np.asarray(trial.allowance)
    return np.min(last.reshape(len(last), -1), axis=1) > 30 * allowance


def path_of(guarantee: Guarantee, drawn: Any, trial: Trial, lane: int) -> Path:
    """The path of one lane."""
    measured, bound = (np.asarray(part)[lane].reshape(len(guarantee.horizon), -1) for part in trial[:2])
    ratio = ratios(trial)[lane]
    alone = [ratios(Trial(measured[None, :, j], bound[None, :, j], trial.allowance[lane : lane + 1], {})).max()
             for j in range(measured.shape[1])]  # fmt: skip
    j = int(np.argmax(alone))
    if isinstance(drawn, Recipe):
        drawn = dataclasses.replace(drawn, seed=drawn.seed + lane)
    allowance = float(np.asarray(trial.allowance)[lane])
    return Path(drawn, guarantee.horizon, ratio, measured[:, j], bound[:, j], allowance)


def judge(guarantee: Guarantee, drawn: Any, trial: Trial) -> tuple[Path, Counterexample | None]:
    """(the worst path of a trial, the counterexample that it is, or None)."""
    for name, margin in trial.margins.items():
        if not (np.asarray(margin) >= 0).all():
            lane = int(np.argmax(~(np.asarray(margin) >= 0)))
            path = path_of(guarantee, drawn, trial, lane)
            return path, Counterexample(path, name)
    path = path_of(guarantee, drawn, trial, int(np.argmax(ratios(trial).max(axis=1))))
    return path, Counterexample(path, "bound") if path.worst > 1 + SLACK else None


def search(
    guarantee: Guarantee,
    *,
    examples: int = 200,
    seconds: float = math.inf,
    seed: int = 0,
    lanes: int | None = None,
    shrink: bool = True,
) -> Finding:
    """Try to break `guarantee`.

    Args:
        guarantee: the claim.
        examples: draws of Hypothesis; half of them climb towards violation from the worst ones.
        seconds: stop drawing after so many; what is found is still shrunk.
        seed: makes the search repeatable.
        lanes: instances per recipe; default the guarantee's own number.
        shrink: simplify a counterexample.
    """
    with extra("cli"):
        import hypothesis
        from hypothesis import HealthCheck, Phase, Verbosity

    best: list[Path] = []
    late: list[Path] = []
    broken: list[Counterexample] = []
    count = {"draws": 0, "instances": 0}
    began = time.perf_counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, database=None, deadline=None, derandomize=False, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.target, *[Phase.shrink] * shrink), verbosity=Verbosity.quiet, print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @hypothesis.given(guarantee.instances)
    def attempt(drawn: Any) -> None:
        if not broken and time.perf_counter() - began > seconds:
            return
        trial = guarantee.try_on(drawn, lanes)
        path, counterexample = judge(guarantee, drawn, trial)
        if counterexample is not None:
            broken.append(counterexample)
            raise _Broken
        if not broken:
            count["draws"] += 1
            count["instances"] += len(trial.measured)
            if not best or path.worst > best[0].worst:
                best[:] = [path]
            last = np.where(ended(trial), ratios(trial)[:, -1], -1)
            if last.max() >= 0 and (not late or last.max() > late[0].ratio[-1]):
                end = path_of(guarantee, drawn, trial, int(np.argmax(last)))
                late[:] = [end] if end.bound[-1] < 0.9 * end.bound.max() else late  # a bound that falls: it has a rate
        hypothesis.target(math.log(max(path.worst, 1e-30)), label="measured/bound")

    try:
        attempt()
    except _Broken:
        count["draws"] += 1
        count["instances"] += guarantee.lanes if lanes is None else lanes
    found = broken[-1] if broken else None  # Hypothesis ends with the smallest
    tightest = best[0] if best else None
    steady = late[0] if late else tightest
    return Finding(guarantee, count["draws"], count["instances"], tightest, steady, found, time.perf_counter() - began)


def run_path(
    problem: Any, solver: Solver, state: PyTree, key: Array, horizon: tuple[int, ...], look: Callable[[PyTree], Array]
) -> Array:
    """What `look` sees of a solver's states along a run, shape [len(horizon), …]: a measure of solvers is made of it.

    Args:
        problem: what is solved.
        solver: what solves it.
        state: before the first step.
        key: of the run; step k gets fold_in(key, k), as under `solve`.
        horizon: the numbers of steps after which to look, increasing.
        look: state -> […], pure.
    """

    def segment(carry: tuple[PyTree, Array], k: Array) -> tuple[tuple[PyTree, Array], Array]:
        state, at = carry
        state = advance(problem, solver, state, key, at, k - at)[0]
        return (state, k), look(state)

    return jax.lax.scan(segment, (state, jnp.array(0)), jnp.array(horizon))[1]
