"""DSBLO: normalised momentum on doubly perturbed implicit gradients of a linearly constrained lower level."""

import math
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import oracles
from bilevel.backend import draws
from bilevel.backend.tree import norm
from bilevel.oracles import per_sample
from bilevel.parts import tracking
from bilevel.parts.domain import project_upper
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import Scalar
from bilevel.struct import invalid, static, struct
from bilevel.theory.nonsmooth import momentum_settings

PyTree = Any


class State(NamedTuple):
    """What a step of DSBLO needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    m: PyTree
    """The momentum, shaped like x."""
    active: Array
    """The active set at y, shape [rows] or [0], from which the next one starts."""
    upper: PyTree
    """The state of the upper source."""


class Info(NamedTuple):
    """What a step of DSBLO shows, and what can be seen there of the assumptions."""

    momentum: Array
    """|m| after the step, shape []."""
    length: Array
    """The step's length eta |m| with the old m, shape []."""
    margin: Array
    """The least slack or multiplier at y, shape []."""
    feasible: Array
    """Whether the lower level has a point, shape []."""
    independent: Array
    """Whether its active rows are linearly independent (LICQ), shape []."""
    definite: Array
    """Whether g_yy is positive definite, shape []."""
    strict: Array
    """Whether the margin is more than rounding error, shape []."""


@struct(kw_only=True)
class DSBLO(Solver):
    """Doubly stochastically perturbed algorithm for linearly constrained bilevel optimisation. With m the momentum,

        x+ = Proj_X(x - eta m),                  eta = 1/(gamma_1 |m| + gamma_2),
        xbar = x + s (x+ - x),                   one s ~ U[0, 1] for the whole step,
        g = grad F_q(xbar),                      q random, F_q(x) = f(x, y_q(x)), y_q = argmin g(x, y) + q'y,
        m+ = beta m + (1 - beta) g.

    Both perturbations make the gradients of a Lipschitz F with kinks average to the gradient of a smooth function near
    it: the points x found are Goldstein-stationary for the mean of F_q over q.

    Assumptions: g(x, .) strongly convex, rows A y + B x <= b (or a polyhedral set) that are linearly independent where
    they are active, F Lipschitz. For the theory X is the whole space. Info and the report show where they fail.
    Cost per step: with T = num_lower_steps and n = dim y, for each of the perturbations 1 upper gradient, T lower
        gradients, n HVPs (n (T + 1) where g is not quadratic; none with `Minimize.diagonal` on a box) and 1 JVP. With
        `PerSample` data all on one batch.

    Args:
        beta: the momentum, in [0, 1). Default: 0.9.
        gamma_1: > 0; 1/gamma_1 bounds the length of a step. Default: 10.
        gamma_2: > 0; 1/gamma_2 bounds eta. Default: 10.
        sigma: > 0, the size of q: standard deviation ("gaussian") or radius ("sphere", "ball"). Default: 0.01.
        distribution: the law of q, "gaussian", "sphere" or "ball". Default: "gaussian".
        option: "I", all of f's data in every step, or "II", a batch. Default: "II".
        num_lower_steps: T >= 1, SQP steps for each perturbation; one solves a quadratic g exactly. Default: 2.
        num_perturbations: >= 1, draws of q in a step, averaged, by vmap; the paper has one. Default: 1.

    Reference: Khanduri, Tsaknakis, Zhang, Liu, Hong. A doubly stochastically perturbed algorithm for
        linearly constrained bilevel optimization. 2025, arXiv:2504.04545, Algorithm 1.
    Differs from the paper: x is projected on X where there is one; several q per step on request; the lower level is
        solved by an active-set method, exactly where g is quadratic. Defaults are practical; `from_theory` has the
        paper's constants.
    """

    beta: Scalar = 0.9
    gamma_1: Scalar = 10.0
    gamma_2: Scalar = 10.0
    sigma: Scalar = 0.01
    distribution: str = static(default="gaussian")
    option: str = static(default="II")
    num_lower_steps: int = static(default=2)
    num_perturbations: int = static(default=1)
    guarantees = ("ds-blo", "ds-blo-accuracy", "ds-blo-goldstein", "ds-blo-implicit", "ds-blo-law", "ds-blo-momentum")
    assumptions = tracking.ASSUMPTIONS
    renamed = MappingProxyType({"gamma1": "gamma_1", "gamma2": "gamma_2"})
    about = About(
        idea="momentum on gradients perturbed twice",
        data="all of g, batches of f",
        reference="Khanduri et al. 2025",
        calls="1, T, n, 1 for each perturbation",
        smoothing="a fresh perturbation of g each step",
        stops="a ball around a Goldstein-stationary point of the smoothed F",
    )

    def __post_init__(self) -> None:
        """Check what is not an array."""
        draws.check_distribution("DSBLO.distribution", self.distribution)
        if self.option not in ("I", "II"):
            invalid("DSBLO.option", repr(self.option), "'I' or 'II'", "II takes batches of the upper data.")
        for name, low, high in (
            ("beta", 0, 1),
            ("gamma_1", 0, math.inf),
            ("gamma_2", 0, math.inf),
            ("sigma", 0, math.inf),
        ):
            value = getattr(self, name)
            if isinstance(value, int | float) and not (low <= value < high and (name == "beta" or value > low)):
                invalid(f"DSBLO.{name}", value, f"a number between {low} and {high}", "See the class's arguments.")

    @classmethod
    def from_theory(
        cls, L_F: float, accuracy: float, radius: float, sigma_F: float = 0.0, option: str = "I", **more: Any
    ) -> "DSBLO":
        """The paper's constants for mean dist(0, Goldstein subdifferential) <= accuracy at `radius`.

            beta = 1 - e^2/(960 (d^2 + 2 L_F^2)),  K = ln(32 c/e)/ln(1/beta),
            gamma_1 = K/radius,  gamma_2 = 4 gamma_1 c,

        e = accuracy, c = d + 2 L_F; d = 2 L_F (option I) or d^2 = sigma_F^2 + 4 L_F^2 (II). 1 - beta is tiny and the
        number of steps of order e^-4/radius.

        Args:
            L_F: Lipschitz constant of F.
            accuracy: e > 0.
            radius: of the Goldstein subdifferential, > 0.
            sigma_F: standard deviation of the stochastic gradient, for option II.
            option: "I" or "II".
            **more: the other settings.
        """
        d = math.sqrt(4 * L_F**2 + (sigma_F**2 if option == "II" else 0))
        c = d + 2 * L_F
        gap = accuracy**2 / (960 * (d**2 + 2 * L_F**2))
        K = math.log(32 * c / accuracy) / -math.log1p(-gap)
        return cls(beta=1 - gap, gamma_1=K / radius, gamma_2=4 * K / radius * c, option=option, **more)

    @classmethod
    def for_steps(
        cls, L_F: float, gap: float, radius: float, num_steps: int, deviation: float | None = None, **more: Any
    ) -> "DSBLO":
        """The settings whose bound on the mean Goldstein distance at `radius` over `num_steps` steps is least.

        From `theory.nonsmooth.momentum_settings`, our own proof for option I: other constants than the paper's, which
        say something from some hundreds of steps on, at the same order num_steps^(-1/4).

        Args:
            L_F: Lipschitz constant of F and bound of the gradients of F_q.
            gap: F(x_1) - inf F at most, for the mean of F_q over q.
            radius: of the Goldstein subdifferential, > 0.
            num_steps: steps of the run, >= 2.
            deviation: (E|grad F_q - its mean|^2)^(1/2) at most; default L_F.
            **more: the other settings.
        """
        spread = L_F if deviation is None else deviation
        found = momentum_settings(L_F, gap, spread, radius, float(num_steps))
        return cls(beta=found.beta, gamma_1=found.gamma1, gamma_2=found.gamma2, option="I", **more)

    def _gradient(
        self, problem: BilevelProblem, x: PyTree, y: PyTree, active: Array, key: Array, upper: PyTree
    ) -> tuple[PyTree, tracking.Tracked]:
        """(mean of grad F_q over the draws of q, the first draw's lower solution)."""
        here = per_sample.view(problem, y, upper)

        def one(key: Array) -> tuple[PyTree, tracking.Tracked]:
            q = draws.perturbation(key, here.y, self.distribution, self.sigma)
            found = tracking.track(here.problem, x, here.y, active, q, here.lower, self.num_lower_steps)
            return tracking.gradient(here.problem, x, found, here.upper, here.lower), found.solution

        if self.num_perturbations == 1:
            gradient, found = one(key)
        else:
            gradients, found = oracles.batched(one)(jax.random.split(key, self.num_perturbations))
            gradient = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), gradients)
            found = jax.tree.map(lambda leaf: leaf[0], found)
        return gradient, found._replace(y=per_sample.put_back(problem, y, upper, found.y))

    def _batch(self, problem: BilevelProblem, upper: PyTree, key: Array, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        return (problem.upper_data.full(), upper) if self.option == "I" else problem.upper_data.next(upper, key, x, y)

    def init(self, problem: BilevelProblem, key: Array) -> State:
        key_start, key_source, key_batch, key_q = jax.random.split(key, 4)
        x, y = problem.init(key_start)
        x = project_upper(problem, x, y)
        batch, upper = self._batch(problem, problem.upper_data.init(key_source), key_batch, x, y)
        m, found = self._gradient(problem, x, y, tracking.no_rows_active(problem, x, y), key_q, batch)
        return State(x, found.y, m, found.active, upper)

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        key_batch, key_s, key_q = jax.random.split(key, 3)
        size = norm(state.m)
        dtype = size.dtype
        beta, gamma_1, gamma_2 = (jnp.asarray(part, dtype) for part in (self.beta, self.gamma_1, self.gamma_2))
        eta = 1 / (gamma_1 * size + gamma_2)
        x = project_upper(problem, jax.tree.map(lambda a, m: a - eta * m, state.x, state.m), state.y)
        s = jax.random.uniform(key_s, (), dtype)
        xbar = jax.tree.map(lambda a, b: a + s * (b - a), state.x, x)
        batch, upper = self._batch(problem, state.upper, key_batch, xbar, state.y)
        g, found = self._gradient(problem, xbar, state.y, state.active, key_q, batch)
        m = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.m, g)
        info = Info(norm(m), eta * size, **found.assumptions())
        return State(x, found.y, m, found.active, upper), info

    def cost(self, problem: BilevelProblem) -> OracleCount:
        one, q = tracking.track_cost(problem, self.num_lower_steps), self.num_perturbations
        return OracleCount(upper_gradients=q, lower_gradients=q * one.lower_gradients, hvps=q * one.hvps, jvps=q)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return tracking.refuse_not_polyhedral(self, problem)
