"""AT: adversarial training, descent in f_x alone after an attack by projected steps; for min-max problems."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.oracles import per_sample
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver, refuse_unsampled_set
from bilevel.step import Stepper, StepSize, step_sizes, stepper
from bilevel.struct import invalid, static, struct

PyTree = Any


class State(NamedTuple):
    """What a step of AT needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The last attack on every sample."""
    step: Stepper
    """The step rule of x, with its state."""
    upper: PyTree
    """The state of the upper source."""


class Attack(NamedTuple):
    """An attack under way."""

    y: PyTree
    """The point that it has come to."""
    step: Stepper
    """The step rule of y, with its state."""


class Info(NamedTuple):
    """What a step of AT shows."""

    direction: Array
    """Norm of f_x at the attack, shape []."""

    attack: Array
    """Norm of the attack y, shape []."""


@struct(kw_only=True)
class AT(Solver):
    """Adversarial training, on a batch of f a step: from K = num_starts points of Y, T = num_lower_steps steps each,

        y <- Proj_Y(y - a sign R(x, y)),     the start of least g is kept, for each sample,
        x <- Proj_X(x - b f_x(x, y)).

    K = 1: the attack of projected gradient descent. T = 0: random augmentation, the worst of K; with `random_start`
    off, y stays as it is, and from y0 = 0 this is plain training. On the TRADES problem it is TRADES.

    Assumptions: g = -f up to terms that do not depend on x, so that f_x is the gradient of max f (Danskin). Elsewhere
    it leaves out the implicit term and its limit need not be stationary. Y bounded.
    Cost per step: K T lower gradients, K lower values where K > 1, and 1 upper gradient. With `PerSample` data all on
        one batch; else g is on all of its data.

    Args:
        upper_step_size: b > 0. A number, an optax schedule or an optax transformation. Default: 0.1.
        lower_step_size: a > 0, likewise; a schedule is one of the steps within an attack. Default: 2.5/T times the
            distances of y's entries to the middle of their range, for a box; else 0.1.
        num_lower_steps: T >= 0, steps of an attack. Default: 10.
        num_starts: K >= 1, attacks of which the worst is kept. Default: 1.
        random_start: whether starts are drawn from Y; else the attack goes on from the last y, and K must be 1.
            Default: True.
        sign: whether to take the sign of R, and not R itself. Default: True.

    Reference: Madry, Makelov, Schmidt, Tsipras, Vladu. Towards deep learning models resistant to adversarial attacks.
        ICLR 2018, arXiv:1706.06083. Worst of K: Engstrom, Tran, Tsipras, Schmidt, Madry. Exploring the landscape of
        spatial robustness. ICML 2019, arXiv:1712.02779. Zhang et al. Theoretically principled trade-off between
        robustness and accuracy (TRADES). ICML 2019, arXiv:1901.08573.
    Differs from the paper: any f, g and bounded Y.
    """

    upper_step_size: StepSize | None = None
    lower_step_size: StepSize | None = None
    num_lower_steps: int = static(default=10)
    num_starts: int = static(default=1)
    random_start: bool = static(default=True)
    sign: bool = static(default=True)
    about = About(
        idea="min-max problems only: an attack by projected steps, then a step on f alone; worst of K",
        reference="Madry et al. 2018",
        calls="1, S T + S, 0, 0 (S starts; S = 1: T)",
        lower="g = -f up to terms without x, on a bounded Y",
        stops="a noise ball; the implicit term is left out",
    )

    def __post_init__(self) -> None:
        """Check the step sizes and the counts."""
        step_sizes(self, "upper_step_size", "lower_step_size")
        for name, least in (("num_lower_steps", 0), ("num_starts", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                invalid(f"AT.{name}", value, f"a whole number >= {least}", "Leave it out for the default.")
        if self.num_starts > 1 and not self.random_start:
            invalid("AT.num_starts", self.num_starts, "1 where random_start is off", "One y is kept from step to step.")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        key_start, key_source = jax.random.split(key)
        x, y = problem.init(key_start)
        x, y = problem.x_set.project(x), problem.y_set.project(y)
        return State(x, y, stepper(self.upper_step_size, 0.1, x), problem.upper_data.init(key_source))

    def _attack(self, here: per_sample.View, x: PyTree, y: PyTree) -> PyTree:
        """T steps from y."""
        scale, default = optax.tree.ones_like(y), 0.1
        bounds = here.problem.y_set.bounds(y)
        if self.lower_step_size is None and bounds is not None:
            lo, hi = bounds
            scale, default = jax.tree.map(lambda lo, hi: (hi - lo) / 2, lo, hi), 2.5 / max(self.num_lower_steps, 1)

        def body(_: int, at: Attack) -> Attack:
            R = oracles.residual(here.problem, x, at.y, here.lower)
            R = jax.tree.map(lambda r, s: s * (jnp.sign(r) if self.sign else r), R, scale)
            y, step = at.step(at.y, R)
            return Attack(here.problem.y_set.project(y), step)

        start = Attack(y, stepper(self.lower_step_size, default, y))
        return jax.lax.fori_loop(0, self.num_lower_steps, body, start).y

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        key_batch, key_start = jax.random.split(key)
        batch, upper = problem.upper_data.next(state.upper, key_batch, state.x, state.y)
        here = per_sample.view(problem, state.y, batch)
        y_set = here.problem.y_set

        def attack(key: Array) -> PyTree:
            return self._attack(here, state.x, y_set.sample(key, here.y) if self.random_start else here.y)

        if self.num_starts == 1:
            y = attack(key_start)
        else:
            ys = oracles.batched(attack)(jax.random.split(key_start, self.num_starts))
            values = oracles.values_by_sample(here.problem, state.x, ys, here.lower)
            y = per_sample.choose(here, ys, jnp.argmin(values, axis=0))
        fx, _ = oracles.upper_gradients(here.problem, state.x, y, here.upper)
        x, step = state.step(state.x, fx)
        return State(problem.x_set.project(x), per_sample.put_back(problem, state.y, batch, y), step, upper), Info(
            norm(fx), norm(y)
        )

    def cost(self, problem: BilevelProblem) -> OracleCount:
        K = self.num_starts
        return OracleCount(upper_gradients=1, lower_values=K if K > 1 else 0, lower_gradients=K * self.num_lower_steps)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_unsampled_set(self, problem)
