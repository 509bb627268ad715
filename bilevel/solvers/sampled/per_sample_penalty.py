"""PerSamplePenalty: the sampled value-function penalty for lower levels that split over the samples, on batches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.tree import join, norm, take
from bilevel.oracles import per_sample
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.sampled.smoothing import smooth_min
from bilevel.solver import About, Solver, refuse_unsampled_set
from bilevel.step import Scalar, Stepper, StepSize, require_numbers, step_sizes, stepper
from bilevel.struct import invalid, static, struct

PyTree = Any


class State(NamedTuple):
    """What a step of PerSamplePenalty needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """Each sample's candidate of least g when it was last looked at."""
    slots: PyTree
    """Candidates that are kept, num_slots of them shaped like y and stacked, of least g when last looked at."""
    step: Stepper
    """The step rule of x, with its state."""
    upper: PyTree
    """The state of the upper source."""
    count: Array
    """Steps done, shape []."""


class Info(NamedTuple):
    """What a step of PerSamplePenalty shows."""

    direction: Array
    """Norm of the gradient of P, shape []."""

    objective: Array
    """P on the batch, shape []."""

    penalty: Array
    """rho, shape []."""


@struct(kw_only=True)
class PerSamplePenalty(Solver):
    """Experimental: written from the abstract of arXiv:2505.10830 alone.

    `SampledPenalty`'s lifted form, for each sample i of a batch with candidates y_ik of its own:

        P(x) = mean_i { M_{rho t}[f_i(x, y_ik) + rho g_i(x, y_ik)] - rho M_t[g_i(x, y_ik)] },   M over k,
        x <- Proj_X(x - a grad P),

    M the entropic smooth minimum of `sampled.smoothing`. Candidates: num_slots that the sample keeps from its last
    batch; of the others a quarter, at least one, near these, the rest drawn from Y. The num_slots of least g are kept,
    and P is taken over them: its minimum of g is that over all candidates. rho climbs from `penalty` to `max_penalty`
    while rho t stays.

    Assumptions: f is a mean and g a sum over samples that have an own y each (`PerSample`; any other problem counts as
    one sample), Y_i bounded and of low dimension. No guarantee is claimed: candidates change from step to step.
    Cost per step: num_samples lower values, num_slots upper and lower gradients; with `PerSample` data on one batch.

    Args:
        upper_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: 0.1.
        penalty: rho > 0 at the first step. Default: 1.
        max_penalty: rho > 0 after `num_ladder_steps` steps. Default: 10.
        temperature: rho t > 0, in units of f. Default: 0.1.
        num_samples: candidates a sample, more than num_slots. Default: 9.
        num_slots: >= 1, candidates that are kept. Default: 2.
        num_ladder_steps: >= 1, steps to the last rho. Default: 200.

    Reference: A discretization approach for bilevel optimization with low-dimensional and non-convex lower-level. 2025,
        arXiv:2505.10830. From its abstract alone: sampled feasible points, a convexified value function, a penalty.
    Differs from the paper: as `SampledPenalty`; samples of the data have candidates of their own, and batches are used.
    """

    upper_step_size: StepSize | None = None
    penalty: Scalar = 1.0
    max_penalty: Scalar = 10.0
    temperature: Scalar = 0.1
    num_samples: int = static(default=9)
    num_slots: int = static(default=2)
    num_ladder_steps: int = static(default=200)
    about = About(
        idea="`SampledPenalty` for an own y of each sample, in batches",
        reference="arXiv:2505.10830, 2025",
        calls="K, N + K, 0, 0 (N candidates, K kept, on one batch)",
        lower="each sample's own g_i on a bounded Y_i of low dimension",
        stops="a noise ball, and a bias like 1/lam",
    )
    experimental = "written from the abstract of arXiv:2505.10830 alone"

    def __post_init__(self) -> None:
        """Check the step size, the numbers and the counts."""
        step_sizes(self, "upper_step_size")
        require_numbers(self, "penalty", "max_penalty", "temperature")
        least = {"num_slots": 1, "num_samples": self.num_slots + 1, "num_ladder_steps": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                invalid(f"PerSamplePenalty.{name}", value, f"a whole number >= {lowest}", "See the class's arguments.")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        key_start, key_source, key_slots = jax.random.split(key, 3)
        x, y = problem.init(key_start)
        x, y = problem.x_set.project(x), problem.y_set.project(y)
        slots = _draw(problem, key_slots, self.num_slots, y)
        return State(
            x, y, jax.tree.map(lambda s, p: s.at[0].set(p), slots, y), stepper(self.upper_step_size, 0.1, x),
            problem.upper_data.init(key_source), jnp.zeros((), int),
        )  # fmt: skip

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        key_batch, key_fresh, key_near = jax.random.split(key, 3)
        x = state.x
        batch, upper = problem.upper_data.next(state.upper, key_batch, x, state.y)
        here = per_sample.view(problem, state.y, batch)
        slots = jax.vmap(lambda slot: per_sample.rows_of(problem, slot, batch))(state.slots)
        candidates = self._candidates(here, slots, key_fresh, key_near)
        g = oracles.values_by_sample(here.problem, x, candidates, here.lower)
        order = jnp.argsort(g, axis=0)[: self.num_slots]  # [num_slots, samples]
        slots = jax.vmap(lambda index: per_sample.choose(here, candidates, index))(order)
        rho, smooth = self._rung(state.count, g.dtype)

        def penalty(f: Array, g: Array) -> Array:
            return smooth_min(f + rho * g, smooth, True).value - rho * smooth_min(g, smooth / rho, True).value

        value, gradient = oracles.penalty_by_sample(here.problem, x, slots, here.upper, here.lower, penalty)
        x, step = state.step(x, gradient)
        y = per_sample.put_back(problem, state.y, batch, take(slots, 0))
        slots = jax.vmap(lambda old, new: per_sample.put_back(problem, old, batch, new))(state.slots, slots)
        info = Info(norm(gradient), value, rho)
        return State(problem.x_set.project(x), y, slots, step, upper, state.count + 1), info

    def _candidates(self, here: per_sample.View, slots: PyTree, key_fresh: Array, key_near: Array) -> PyTree:
        """The slots, points near them, and points drawn from Y: num_samples in all, stacked."""
        fresh = _draw(here.problem, key_fresh, self.num_samples - self.num_slots, here.y)
        num_near = max(1, (self.num_samples - self.num_slots) // 4)
        near = _shaken(here.problem, key_near, slots, take(fresh, slice(num_near)))
        return join(slots, near, take(fresh, slice(num_near, None)))

    def _rung(self, count: Array, dtype: Any) -> tuple[Array, Array]:
        """(rho after `count` steps; rho t), shapes []."""
        settings = self.penalty, self.max_penalty, self.temperature
        first, last, smooth = (jnp.asarray(number, dtype) for number in settings)
        return first * (last / first) ** jnp.minimum(count / self.num_ladder_steps, 1).astype(dtype), smooth

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(
            upper_gradients=self.num_slots, lower_values=self.num_samples, lower_gradients=self.num_slots
        )

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_unsampled_set(self, problem)


def _draw(problem: BilevelProblem, key: Array, num: int, like: PyTree) -> PyTree:
    """`num` points of Y shaped like `like`, stacked; every sample's own."""
    return jax.vmap(lambda key: problem.y_set.sample(key, like))(jax.random.split(key, num))


def _shaken(problem: BilevelProblem, key: Array, slots: PyTree, like: PyTree) -> PyTree:
    """As many points as `like` has, between a slot and these: up to a third of the way."""
    num, count = len(jax.tree.leaves(like)[0]), len(jax.tree.leaves(slots)[0])
    chosen = take(slots, jnp.arange(num) % count)
    reach = jax.random.uniform(key, (num,), ravel_pytree(like)[0].dtype, 0, 1 / 3)
    way = lambda a, b: a + reach.reshape(-1, *[1] * (a.ndim - 1)) * (b - a)  # noqa: E731
    return jax.vmap(problem.y_set.project)(jax.tree.map(way, chosen, like))
