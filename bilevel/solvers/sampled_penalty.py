"""SampledPenalty: a value-function penalty over samples of a lower level that is non-convex and constrained."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.diagnostics import norm
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import OracleCount
from bilevel.sampling import (
    Smoothness,
    cover,
    descend,
    join,
    near,
    polish,
    repeat,
    restore,
    shifted,
    smooth_min,
    starts,
    take,
    unbounded,
    uncoupled,
    violation,
    where,
)
from bilevel.solver import Solver
from bilevel.step import require_number, step_sizes
from bilevel.struct import invalid, static, struct

PyTree = Any
LENGTHS = (8.0, 2.0, 0.5, 0.125, 0.0)  # of a line search, times the last one, beside a random one
FIRST_TEMPERATURE, FIRST_PENALTY, LAST_PENALTY = 0.1, 1e-2, 1e4  # in units of the objectives' spreads at the start
TRACK = 4  # descent steps by which the two best samples follow x in a line search
CHECK, BLOCKS = 512, 4  # points of Y where `output` looks for lower values of g; how many of them it polishes
FEASIBLE = 1e-7


class State(NamedTuple):
    """Everything is stacked over L = num_starts num_ladders lanes; lane i is start i // num_ladders.

    x, y; samples [L, N, ...], whose last 2 num_slots are the slots, the very last of them y; sizes [L, 2 num_slots],
    the slots' steps, and size [L], x's, 0 where none is known; rule, the step rule's state; shift [L, rows], the
    multipliers of the coupling over their weight. first, last [L]: the ends
    of the ladder. smooth []: the first temperature, scales: the spreads of f and g. count: steps done.
    """

    x: PyTree
    y: PyTree
    samples: PyTree
    sizes: Array
    size: Array
    rule: PyTree
    shift: Array
    first: Array
    last: Array
    smooth: Array
    scales: tuple[Array, Array]
    count: Array


class Info(NamedTuple):
    """Per lane [L]: the penalised objective, the penalty rho, and g(x, y) less the least g of the samples."""

    objective: Array
    penalty: Array
    gap: Array


@struct
class SampledPenalty(Solver):
    """Gradient descent on f plus rho times the lower gap, with v(x) = min g(x, .) taken over samples y_i of Y:

        lifted:  P(x) = M_{rho t}[f_i + rho g_i](x) - rho M_t[g_i](x),                  y = the best y_i of the first
        joint:   P(x, y) = f(x, y) + rho (g(x, y) - M_t[g_i](x))
        x (and y) <- Proj(x - s grad P),    f_i = f(x, y_i),    g_i = g(x, y_i),

    M the entropic or quadratic smoothed minimum of `bilevel.sampling`. The lifted P has no minimum that comes only from
    a local minimiser of g; the joint one has one for each. rho climbs a ladder from `penalty` to `max_penalty` while
    rho t falls like 1/rho. There are num_starts times num_ladders independent lanes, which start at points of X and on
    different rungs of the ladder; `output` takes the best of them.

    Samples are renewed at each step, N fixed: fresh Sobol points of Y and its boundary, points near the slots, and the
    slots. Half of the slots descend g(x, .), half f + rho g, y among them; each moves to the best of its share of the
    new points where that is lower. During a line search the best sample of either kind follows x by TRACK steps. With
    `refresh=False` the samples stay as drawn and P is a fixed function. A coupled Y(x) enters g by the method of
    multipliers and f by a growing squared violation; `output` moves y into Y(x).

    `output` polishes y to a minimiser of g(x, .) over Y(x), checks it against g at other points, and takes the lane of
    least f with a gap of at most `lower_tol`. Where the polished y is worse by more than 1e-3 (1 + |f|), it is the
    sample before polishing, if its gap is as small: so the optimum is found where it sits at an isolated x.

    Assumptions: f and g smooth, Y bounded and of low dimension (1 to about 10; more, where g is separable or has few
    minima). Guarantee, with `from_theory`: min_k |G_k|^2 <= 2 L (P_0 - inf P)/K for the gradient mapping G of P.
    Cost per step: L (7 N + 2 num_slots) values and L (N + 2 num_slots + 60) gradients of f and of g, with N samples a
    lane; 60, of six trials that follow two samples, and six of the 7 N are the line search's.

    Args:
        upper_step_size: s > 0, an optax schedule or an optax transformation. Default: the best of five lengths, one of
            them random, and of staying, all tried at once.
        penalty: rho > 0 at the foot of the lowest ladder. Default: 1/100 of the spread (standard deviation over the
            samples) of f over that of g, at the starts.
        max_penalty: rho > 0 at the top. Default: 1e4 times that ratio.
        temperature: rho t > 0 at the foot, in units of f. Default: 0.1 times the spread of f.
        lower_tol: > 0, the lower gap that `output` accepts.
        form: "lifted" or "joint". smoothing: "entropic" or "quadratic".
        num_samples: fresh samples, >= 8. num_slots: slots of each kind, >= 1.
        num_starts: lanes in x, >= 1; the first is init's x0. num_ladders: >= 1. num_ladder_steps: steps to the top.
        refresh: whether samples are renewed. chunk: samples in memory at once, of a lane.

    Reference: A discretization approach for bilevel optimization with low-dimensional and non-convex lower-level. 2025,
        arXiv:2505.10830. From its abstract alone: sampled feasible points, a convexified value function, a penalty.
    Differs from the paper: everything beyond that is derived here: the lifted form, the smoothing, ladders, refresh,
        polish, the treatment of Y(x) and the constants of `from_theory`.
    """

    upper_step_size: Any = None
    penalty: Any = None
    max_penalty: Any = None
    temperature: Any = None
    lower_tol: Any = 1e-5
    form: str = static(default="lifted")
    smoothing: str = static(default="entropic")
    num_samples: int = static(default=64)
    num_slots: int = static(default=8)
    num_starts: int = static(default=8)
    num_ladders: int = static(default=3)
    num_ladder_steps: int = static(default=200)
    refresh: bool = static(default=True)
    chunk: int = static(default=1024)
    full_batch = many_minimisers = True
    guarantees = ("sampled-value", "sampled-penalty", "sampled-kkt")

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations; check the choices."""
        numbers = ("penalty", "max_penalty", "temperature", "lower_tol")
        step_sizes(self, "upper_step_size", *numbers)
        for name in numbers:
            if getattr(self, name) is not None:
                require_number(f"SampledPenalty.{name}", getattr(self, name))
        for name, known in (("form", ("lifted", "joint")), ("smoothing", ("entropic", "quadratic"))):
            if getattr(self, name) not in known:
                invalid(f"SampledPenalty.{name}", repr(getattr(self, name)), " or ".join(known), "Choose one.")
        least = {"num_samples": 8, "num_slots": 1, "num_starts": 1, "num_ladders": 1, "num_ladder_steps": 1, "chunk": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                invalid(f"SampledPenalty.{name}", value, f"a whole number >= {lowest}", "Leave it out for the default.")

    @classmethod
    def from_theory(
        cls, constants: Smoothness, epsilon: float, form: str = "lifted", num_samples: int = 64, num_starts: int = 1
    ) -> "SampledPenalty":
        """Frozen samples, rho = 1/epsilon, t = epsilon^2/log N and s = 1/L with the smoothness L of P.

        joint:  L = L_f + 2 rho L_g + rho D_g^2/(4 t)
        lifted: L = L_f + 2 rho L_g + rho D_g^2/(4 t) + (D_f + rho D_g)^2/(4 rho t)

        from `sampling.Smoothness`. Then min_k |G_k|^2 <= 2 L (P_0 - inf P)/K, so that K = O(epsilon^-5) steps up to
        logarithms give |G| <= epsilon; and v_N - epsilon^2 <= M_t[g_i] <= v_N.

        Raises:
            InvalidInput: epsilon outside of (0, 1].
        """
        if not 0 < epsilon <= 1:
            invalid("epsilon (SampledPenalty.from_theory)", epsilon, "a number in (0, 1]", "It is the accuracy of |G|.")
        rho, t, c = 1 / epsilon, epsilon**2 / np.log(num_samples), constants
        L = c.L_f + 2 * rho * c.L_g + rho * c.D_g**2 / (4 * t)
        if form == "lifted":
            L = L + (c.D_f + rho * c.D_g) ** 2 / (4 * rho * t)
        return cls(
            upper_step_size=1 / L, penalty=rho, max_penalty=rho, temperature=rho * t, form=form, refresh=False,
            num_samples=num_samples, num_starts=num_starts, num_ladders=1,
        )  # fmt: skip

    @property
    def _count(self) -> int:
        """Samples of a lane: spread over Y; near the slots; the slots, or without refresh the joint form's y."""
        extra = self.num_samples // 2 + 2 * self.num_slots if self.refresh else int(self.form == "joint")
        return self.num_samples + extra

    def init(self, problem: BilevelProblem, key: Array) -> State:
        problem = problem.on_full_data()
        key_start, key_x, key_y = jax.random.split(key, 3)
        x0, y0 = problem.init(key_start)
        x0, y0 = problem.x_set.project(x0), problem.y_set.project(y0)
        x, lanes = starts(problem.x_set, key_x, self.num_starts, x0), self.num_starts * self.num_ladders
        samples = cover(problem.y_set, key_y, self._count, y0)
        data = problem.upper_data.full(), problem.lower_data.full()

        def spreads(x: PyTree) -> tuple[Array, Array]:
            f, g = oracles.sample_values(problem, x, samples, *data, self.chunk)
            return jnp.std(f), jnp.std(g)

        scales = jax.tree.map(jnp.mean, jax.vmap(spreads)(x))
        scales = jax.tree.map(lambda s: jnp.where((s > 0) & jnp.isfinite(s), s, 1), scales)
        unit = scales[0] / scales[1]
        first, last, smooth = (
            default if rule is None else jnp.asarray(rule.value, unit.dtype)
            for rule, default in (
                (self.penalty, FIRST_PENALTY * unit),
                (self.max_penalty, LAST_PENALTY * unit),
                (self.temperature, FIRST_TEMPERATURE * scales[0]),
            )
        )
        foot = first * (last / first) ** (jnp.arange(self.num_ladders, dtype=unit.dtype) / (2 * self.num_ladders))
        x = jax.tree.map(lambda leaf: jnp.repeat(leaf, self.num_ladders, axis=0), x)
        y, zero = repeat(y0, lanes), jnp.zeros(lanes, unit.dtype)
        rule = () if self.upper_step_size is None else jax.vmap(self.upper_step_size.init)((x, y))
        shift = repeat(jnp.zeros_like(oracles.coupling_residual(problem, x0, y0)), lanes)
        return State(
            x, y, self._with_y(repeat(samples, lanes), y), jnp.zeros((lanes, 2 * self.num_slots), unit.dtype), zero,
            rule, shift, jnp.tile(foot, self.num_starts), last + zero, smooth, scales, jnp.zeros((), int),
        )  # fmt: skip

    def _with_y(self, samples: PyTree, y: PyTree) -> PyTree:
        """All lanes' samples with y as the last; the lifted form's frozen samples stay as they are."""
        if not self.refresh and self.form == "lifted":
            return samples
        return jax.tree.map(lambda s, p: s.at[:, -1].set(p), samples, y)

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        data = problem.upper_data.full(), problem.lower_data.full()
        climbed = jnp.minimum(state.count / self.num_ladder_steps, 1).astype(state.first.dtype)
        growth = (state.last / state.first) ** climbed
        rho, smooth, weight = state.first * growth, state.smooth / growth, jnp.sqrt(growth)
        keys = jax.random.split(key, len(rho) + 1)
        fresh = cover(problem.y_set, keys[0], self.num_samples, take(state.y, 0)) if self.refresh else ()
        joint, rule = self.form == "joint", self.upper_step_size

        def lane(x, samples, sizes, size, state_of_rule, shift, rho, smooth, weight, key):
            plain = uncoupled(problem, weight * state.scales[0], state.scales[1], shift)

            def values(x: PyTree, ys: PyTree) -> tuple[Array, Array]:
                return oracles.sample_values(plain, x, ys, *data, self.chunk)

            def gradients(x: PyTree, ys: PyTree, a: Array, b: Array) -> tuple[PyTree, PyTree]:
                return oracles.sample_gradients(plain, x, ys, a, b, *data, self.chunk)

            if self.refresh:
                samples, sizes, f, g = self._renew(problem, x, samples, sizes, rho, fresh, key, values, gradients)
            else:
                f, g = values(x, samples)
            first = -2 * self.num_slots
            if self.refresh:  # the first slot is the least of g, the last one that of f + rho g or the variable y
                low, up = jnp.argmin(g), -1 if joint else jnp.argmin(f + rho * g)
                put = lambda part: part.at[first].set(part[low]).at[-1].set(part[up])  # noqa: E731
                samples, f, g = jax.tree.map(put, (samples, f, g))
            objective, a, b = self._penalised(f, g, rho, smooth)
            by_x, by_y = gradients(x, samples, a, rho * (a - b))
            y = take(samples, -1)
            direction = by_x, jax.tree.map(lambda d: d[-1] if joint else jnp.zeros_like(d[-1]), by_y)

            def project(point: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
                return problem.x_set.project(point[0]), problem.y_set.project(point[1]) if joint else point[1]

            if rule is not None:
                point, state_of_rule = rule.apply((x, y), direction, state_of_rule)
                x, y = project(point)
            else:

                def attempt(size: Array) -> tuple[Any, ...]:
                    x1, y1 = project(jax.tree.map(lambda p, d: p - size * d, (x, y), direction))
                    ys = jax.tree.map(lambda s, p: s.at[-1].set(p), samples, y1)
                    if self.refresh:  # the best samples follow x, or else only other samples would be near them
                        ys = follow(x1, ys, first, 0, 1)
                        ys = ys if joint else follow(x1, ys, -1, 1, rho)
                    f1, g1 = values(x1, ys)
                    value = self._penalised(f1, g1, rho, smooth)[0]
                    return x1, y1, ys, f1, g1, jnp.where(jnp.isfinite(value), value, jnp.inf)

                def follow(x: PyTree, ys: PyTree, k: int, a: Any, b: Any) -> PyTree:
                    look = lambda y: oracles.weighted_value_and_gradient(plain, x, y, a, b, *data)  # noqa: E731
                    moved = descend(problem.y_set, look, take(ys, k), TRACK, sizes[k])[0]
                    return jax.tree.map(lambda s, p: s.at[k].set(p), ys, moved)

                length = norm(direction)
                reach = (1 + norm(x)) / jnp.where(length > 0, length, 1)
                chance = reach * 10 ** jax.random.uniform(jax.random.fold_in(key, 1), (1,), size.dtype, -6, 0)
                tries = jnp.where(size > 0, size, reach / 80) * jnp.asarray(LENGTHS, size.dtype)
                tries = jnp.concatenate([chance, tries])
                tried = oracles.batched(attempt)(tries)
                k = jnp.argmin(tried[-1])
                x, y, samples, f, g, objective = take(tried, k)
                size = jnp.clip(jnp.where(tries[k] > 0, tries[k], tries[-2] / 8), 1e-9 * reach, reach)
            best = jnp.argmin(f + rho * g)
            if not joint:
                y = take(samples, best)
            gap = g[-1 if joint else best] - jnp.min(g)
            shift = shifted(problem, x, take(samples, jnp.argmin(g)), shift)
            return x, y, samples, sizes, size, state_of_rule, shift, Info(objective, rho, gap)

        x, y, samples, sizes, size, state_of_rule, shift, info = oracles.batched(lane)(
            state.x, state.samples, state.sizes, state.size, state.rule, state.shift, rho, smooth, weight, keys[1:]
        )
        return state._replace(
            x=x, y=y, samples=self._with_y(samples, y), sizes=sizes, size=size, rule=state_of_rule, shift=shift,
            count=state.count + 1,
        ), info  # fmt: skip

    def _penalised(self, f: Array, g: Array, rho: Array, smooth: Array) -> tuple[Array, Array, Array]:
        """(P, weights of the minimum over f + rho g, weights of that over g) at temperature rho t = smooth."""
        entropic = self.smoothing == "entropic"
        frozen_joint = self.form == "joint" and not self.refresh  # y is then no sample of v
        v, b = smooth_min(g.at[-1].set(jnp.inf) if frozen_joint else g, smooth / rho, entropic)
        if self.form == "joint":
            return f[-1] + rho * (g[-1] - v), jnp.zeros_like(f).at[-1].set(1), b
        u, a = smooth_min(f + rho * g, smooth, entropic)
        return u - rho * v, a, b

    def _renew(self, problem, x, samples, sizes, rho, fresh, key, values, gradients):
        """(samples, sizes, f, g) at x: fresh points, points near the slots, and the slots after a step each."""
        count = 2 * self.num_slots
        slots = take(samples, slice(-count, None))
        is_upper = jnp.arange(count) >= self.num_slots
        a, b = is_upper.astype(rho.dtype), jnp.where(is_upper, rho, 1)
        fixed = (jnp.arange(count) == count - 1) & (self.form == "joint")  # the last slot is then the variable y
        by_y = gradients(x, slots, a, b)[1]
        steep = jax.vmap(norm)(by_y)
        spread = jnp.linalg.norm(jnp.std(jax.vmap(lambda y: ravel_pytree(y)[0])(fresh), axis=0))
        sizes = jnp.where(sizes > 0, sizes, 0.1 * spread / jnp.where(steep > 0, steep, 1))
        shift = lambda s, d: s - jnp.where(fixed, 0, sizes).reshape(-1, *[1] * (s.ndim - 1)) * d  # noqa: E731
        trial = jax.vmap(problem.y_set.project)(jax.tree.map(shift, slots, by_y))

        new = join(fresh, near(problem.y_set, key, self.num_samples // 2, slots, fresh))
        f, g = values(x, join(new, slots, trial))
        (f, fs, ft), (g, gs, gt) = (jnp.split(part, [len(part) - 2 * count, len(part) - count]) for part in (f, g))
        margin = -1e3 * jnp.finfo(f.dtype).eps * (jnp.abs(a * fs) + jnp.abs(b * gs))  # so that rounding decides nothing
        change = a * (ft - fs) + b * (gt - gs)
        falls = change < margin
        sizes = jnp.where(falls, 2 * sizes, jnp.where(change > -margin, sizes / 4, sizes))
        slots, fs, gs = where(falls, trial, slots), jnp.where(falls, ft, fs), jnp.where(falls, gt, gs)

        share = len(f) // count * count  # slot j is challenged by the new points j, j + count, …
        score = a[None] * f[:share].reshape(-1, count) + b[None] * g[:share].reshape(-1, count)
        best = jnp.argmin(score, axis=0)
        wins = (jnp.min(score, axis=0) - a * fs - b * gs < margin) & ~fixed
        best = best * count + jnp.arange(count)
        slots, sizes = where(wins, take(new, best), slots), jnp.where(wins, 0, sizes)
        fs, gs = jnp.where(wins, f[best], fs), jnp.where(wins, g[best], gs)
        return join(new, slots), sizes, jnp.concatenate([f, fs]), jnp.concatenate([g, gs])

    def output(self, problem: BilevelProblem, state: State) -> tuple[PyTree, PyTree]:
        return _best(problem, self, state)

    def cost(self, problem: BilevelProblem) -> OracleCount:
        lanes, slots = self.num_starts * self.num_ladders, 2 * self.num_slots if self.refresh else 0
        searches = 1 + len(LENGTHS) if self.upper_step_size is None else 0
        tracked = (1 + (self.form == "lifted")) * (1 + TRACK) * self.refresh
        values, gradients = self._count * (1 + searches) + slots, self._count + slots + searches * tracked
        values, gradients = lanes * values, lanes * gradients
        return OracleCount(values, gradients, values, gradients)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        lower, y_set = type(problem.lower).__name__, type(problem.y_set).__name__
        if not isinstance(problem.lower, Minimize):
            return f"SampledPenalty needs a lower level Minimize(g), whose values it compares; got {lower}."
        if unbounded(problem.y_set):
            return f"SampledPenalty samples Y, which must be bounded, below {lower}(g); got y_set = {y_set}, unbounded."
        return None


@jax.jit
def _best(problem: BilevelProblem, solver: SampledPenalty, state: State) -> tuple[PyTree, PyTree]:
    """(x, y) of the lane of least f among those whose y is feasible with a gap within lower_tol; else of least gap."""
    problem = problem.on_full_data()
    data = problem.upper_data.full(), problem.lower_data.full()
    tolerance = jnp.asarray(solver.lower_tol.value, state.smooth.dtype)
    check = cover(problem.y_set, jax.random.key(0), CHECK, take(state.y, 0))

    def lane(x: PyTree, y: PyTree, samples: PyTree) -> tuple[PyTree, Array, Array]:
        def look(ys: PyTree, allowed: float) -> tuple[Array, Array]:
            f, g = oracles.sample_values(problem, x, ys, *data, solver.chunk)
            outside = jax.vmap(lambda y: violation(problem, x, y))(ys)
            return f, jnp.where((outside <= allowed) & jnp.isfinite(g), g, jnp.inf) + 0 * outside

        points = join(check, take(samples, slice(-2 * solver.num_slots, None)))
        g = look(points, 1e-3)[1]
        share = len(g) // BLOCKS * BLOCKS
        best = jnp.argmin(g[:share].reshape(-1, BLOCKS), axis=0) * BLOCKS + jnp.arange(BLOCKS)
        raw = join(jax.tree.map(lambda leaf: leaf[None], restore(problem, x, y)), take(points, best))
        points = join(jax.vmap(lambda y: polish(problem, x, y))(raw), raw)
        f, g = look(points, FEASIBLE)
        gap = jnp.where(jnp.isfinite(g), g - jnp.min(g), jnp.inf)
        f = jnp.where(gap <= tolerance, f, jnp.inf)
        f = jnp.where(jnp.arange(len(f)) < len(f) // 2, f, f + 1e-3 * (1 + jnp.abs(f)))
        k = jnp.where(jnp.isfinite(jnp.min(f)), jnp.argmin(f), jnp.argmin(gap))
        point = take(points, k)
        return point, f[k], violation(problem, x, point)

    y, f, outside = jax.vmap(lane)(state.x, state.y, state.samples)
    k = jnp.where(jnp.isfinite(jnp.min(f)), jnp.argmin(f), jnp.argmin(outside))
    return take(state.x, k), take(y, k)
