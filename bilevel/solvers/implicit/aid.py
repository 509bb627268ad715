"""AID: approximate implicit differentiation with warm starts."""

from typing import Any, NamedTuple

import jax
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles, theory
from bilevel.backend.tree import norm
from bilevel.linear import CG, GMRES, LinearSolver
from bilevel.parts.descent import descend
from bilevel.parts.tuning import Iterates, start
from bilevel.problem import BilevelProblem, Constants, Minimize
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import StepSize, step_sizes
from bilevel.struct import static, struct


class Info(NamedTuple):
    """What a step of AID shows."""

    direction: Array
    """|f_x - R_x' v|, shape []: the norm of the hypergradient's approximation."""


@struct(kw_only=True)
class AID(Solver):
    """Approximate implicit differentiation, on all of the data:

        y <- y - a R(x, y)                      num_lower_steps times, from the last y
        v: iterations of `linear` on R_y' v = f_y, from the last v
        x <- Proj_X(x - c (f_x - R_x' v)).

    Assumptions: g strongly convex in y (or T a contraction), smooth f and g, unconstrained lower level. With warm
    starts a fixed number of steps suffices for the rate 1/K of the squared gradient norm.
    Cost per step: 1 upper gradient, num_lower_steps lower gradients, the products of `linear` in HVPs, 1 JVP.

    Args:
        lower_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: the lower step of
            `parts.tuning.default_steps` at the start.
        upper_step_size: c > 0, likewise. Default: the upper step of `parts.tuning.default_steps` at the start.
        num_lower_steps: steps in y, >= 1. Default: 10.
        linear: a linear solver from `bilevel.linear` with max_iterations set; `Neumann` gives AID-FP. Default: 10
            iterations of CG, or of GMRES for fixed points.

    Reference: Pedregosa. Hyperparameter optimization with approximate gradient. ICML 2016, arXiv:1602.02355,
        Algorithm 1.
        Grazzi, Franceschi, Pontil, Salzo. On the iteration complexity of hypergradient computation. ICML 2020,
        arXiv:2006.16218, Algorithm 2. Warm start of v: Ji, Yang, Liang, ICML 2021, arXiv:2010.07962, Algorithm 1.
    Differs from the papers: numbers of iterations are fixed in place of Pedregosa's decreasing tolerances; x is
    projected.
    """

    lower_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    num_lower_steps: int = static(default=10)
    linear: LinearSolver | None = None
    full_batch = True
    guarantees = ("aid", "aid-bias")
    about = About(
        idea="lower steps, then conjugate gradients for the adjoint",
        reference="Pedregosa 2016; Grazzi et al. 2020",
        calls="1, T, Q + 1, 1",
        memory="a few copies of y",
        stops="grad F = 0",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "lower_step_size", "upper_step_size")

    @classmethod
    def from_theory(
        cls, constants: Constants, mu_F: Any, L_F: Any, num_lower_steps: int = 10, num_products: int = 10
    ) -> "AID":
        """Steps for which `theory.aid_matrix` bounds all errors, for every k; g quadratic.

        Args:
            constants: of f and g, with L_gxy = L_gyy = 0.
            mu_F: strong convexity of F.
            L_F: Lipschitz constant of grad F.
            num_lower_steps: >= 1, steps in y.
            num_products: >= 1, iterations of CG.
        """
        a, c = theory.aid_steps(constants, mu_F, L_F, num_lower_steps, num_products)
        linear = CG(tol=0.0, max_iterations=num_products)
        return cls(lower_step_size=a, upper_step_size=c, num_lower_steps=num_lower_steps, linear=linear)

    def _linear(self, problem: BilevelProblem) -> LinearSolver:
        if self.linear is not None:
            return self.linear
        kind = CG if isinstance(problem.lower, Minimize) else GMRES
        return kind(tol=0.0, max_iterations=10)

    def init(self, problem: BilevelProblem, key: Array) -> Iterates:
        rules = self.upper_step_size, self.lower_step_size, self.lower_step_size
        return start(problem.on_full_data(), key, *rules, num_lower_steps=self.num_lower_steps)

    def step(self, problem: BilevelProblem, state: Iterates, key: Array) -> tuple[Iterates, Info]:
        problem = problem.on_full_data()
        x, batch_f, batch_g = state.x, problem.upper_data.full(), problem.lower_data.full()
        y, step_y, lower = descend(problem, x, state.y, state.step_y, state.lower, key, self.num_lower_steps)

        fx, fy = oracles.upper_gradients(problem, x, y, batch_f)
        flat_fy, unravel = ravel_pytree(fy)
        transposed = oracles.flat_operator(problem, x, y, batch_g, transpose=True)
        flat_v, _ = self._linear(problem).iterate(transposed, flat_fy, ravel_pytree(state.v)[0])
        v = unravel(flat_v)
        direction = optax.tree.sub(fx, oracles.cross(problem, x, y, v, batch_g))

        x, step_x = state.step_x(x, direction)
        it = Iterates(problem.x_set.project(x), y, v, step_x, step_y, state.step_v, state.upper, lower)
        return it, Info(norm(direction))

    def cost(self, problem: BilevelProblem) -> OracleCount:
        y = jax.eval_shape(lambda: problem.init(jax.random.key(0))[1])
        size = sum(leaf.size for leaf in jax.tree.leaves(y))
        hvps = self._linear(problem).max_products(size)
        return OracleCount(upper_gradients=1, lower_gradients=self.num_lower_steps, hvps=hvps, jvps=1)
