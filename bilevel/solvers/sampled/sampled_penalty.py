"""SampledPenalty: a value-function penalty over samples of a lower level that is non-convex and constrained."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bilevel import oracles
from bilevel.backend.tree import norm, repeat, take
from bilevel.diagnostics import BY_VALUE
from bilevel.oracles import samples as sample_oracles
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount, Referee
from bilevel.sampled import answer, renewal, sampling
from bilevel.sampled.refine import LENGTHS as NEWTON
from bilevel.sampled.refine import MAX_CG, SIZES, improve, multipliers, restore
from bilevel.sampled.sampling import Blocks, Smoothness, blocks, cover_blocks, pick, smooth_min, starts
from bilevel.solver import About, Solver, refuse_unbounded_set
from bilevel.step import require_number, step_sizes
from bilevel.struct import invalid, static, struct

PyTree = Any
LENGTHS = (8.0, 2.0, 0.5, 0.125, 0.0)  # of a line search, times the last one, beside a random one
FIRST_TEMPERATURE, FIRST_PENALTY, LAST_PENALTY = 0.1, 1e-2, 1e4  # in units of the objectives' spreads at the start
TRACK = 2  # descent steps by which the two best samples follow x in a line search
RESTORES = 32  # projections, at most, of the iterate y on Y(x)
HEAVY = 16  # samples of a coupled set, those of largest weight, whose multipliers P's gradient has
MOST, LEAST = (64, 8, 8, 3), (16, 4, 4, 2)  # default samples, slots, starts and ladders: of one block, of many


class State(NamedTuple):
    """Everything is stacked over L = num_starts num_ladders lanes; lane i is start i // num_ladders.

    x, y; samples [L, N, n, m], whose last 2 num_slots are the slots, the very last of them y; sizes [L, 2 num_slots,
    n], the slots' steps, and size [L], x's, 0 where none is known; rule, the step rule's state. first, last [L]: the
    ends of the ladder. smooth []: the first temperature, scales: the spreads of f and g. count: steps done.
    """

    x: PyTree
    y: PyTree
    samples: Array
    sizes: Array
    size: Array
    rule: PyTree
    first: Array
    last: Array
    smooth: Array
    scales: tuple[Array, Array]
    count: Array


class Sizes(NamedTuple):
    """Fresh samples, slots of each kind, starts and ladders; lanes = starts ladders."""

    samples: int
    slots: int
    starts: int
    ladders: int


class Info(NamedTuple):
    """Per lane [L]: the penalised objective, the penalty rho, and g(x, y) less the least g of the samples."""

    objective: Array
    penalty: Array
    gap: Array


@struct(kw_only=True)
class SampledPenalty(Solver):
    """Gradient descent on f plus rho times the lower gap, with v(x) = min g(x, .) taken over samples y_i of Y:

        lifted:  P(x) = M_{rho t}[f_i + rho g_i](x) - rho M_t[g_i](x),                  y = the best y_i of the first
        joint:   P(x, y) = f(x, y) + rho (g(x, y) - M_t[g_i](x))
        x (and y) <- Proj(x - s grad P),    f_i = f(x, y_i),    g_i = g(x, y_i),

    M the entropic or quadratic smoothed minimum of `sampled.sampling`. The lifted P has no minimum that comes only from
    a local minimiser of g; the joint one has one for each. rho climbs a ladder from `penalty` to `max_penalty` while
    rho t falls like 1/rho. There are num_starts times num_ladders independent lanes, which start at points of X and on
    different rungs of the ladder; `output` takes the best of them. A separable problem (`bilevel.Separable`) has these
    minima and samples for each block: P is the sum.

    Samples are renewed at each step, N fixed: fresh Sobol points of Y and its boundary, points near the slots, and the
    slots. Half of the slots descend g(x, .), half f + rho g, y among them; each moves to the best of its share of the
    new points where that is lower. During a line search the best sample of either kind follows x by TRACK truncated
    Newton steps (`refine.improve`). With `refresh=False` the samples stay as drawn and P is a fixed function. Samples
    of a coupled Y(x) are moved into it at each x, and P's gradient has their multipliers; where Y(x) is empty, f grows
    by the squared violation that is left. The iterate y is moved into Y(x) once more after x. Frozen samples have no
    coupling.

    `output` polishes y to a minimiser of g(x, .) over Y(x), checks it against g at other points, and takes the lane of
    least f with a gap of at most `lower_tol`. Where the polished y is worse by more than 1e-3 (1 + |f|), it is the
    sample before polishing, if its gap is as small: so the optimum is found where it sits at an isolated x.

    Assumptions: f and g smooth, Y bounded, its blocks of low dimension (1 to about 10; more, where g has few minima).
    Guarantee, with `from_theory`: min_k |G_k|^2 <= 2 L (P_0 - inf P)/K for the gradient mapping G of P.
    Cost per step: L (7 N + 2 num_slots + 144) values, L (N + 2 num_slots + 24) gradients of f and of g and 48 L m HVPs,
    with N samples a lane in m dimensions (2 N gradients with a coupling); 144, 24, 48 m and six of the 7 N are the line
    search's.

    Args:
        upper_step_size: s > 0, an optax schedule or an optax transformation. Default: the best of five lengths, one of
            them random, and of staying, all tried at once.
        penalty: rho > 0 at the foot of the lowest ladder. Default: 1/100 of the spread (standard deviation over the
            samples) of f over that of g, at the starts.
        max_penalty: rho > 0 at the top. Default: 1e4 times that ratio.
        temperature: rho t > 0 at the foot, in units of f. Default: 0.1 times the spread of f.
        lower_tol: > 0, the lower gap that `output` accepts.
        form: "lifted" or "joint". smoothing: "entropic" or "quadratic".
        num_samples: fresh samples, >= 8. num_slots: slots of each kind, >= 1. num_starts: lanes in x, >= 1; the first
            is init's x0. num_ladders: >= 1. Default: 64, 8, 8 and 3; of a separable problem of n > 4 blocks 4/n of
            that, at least 16, 4, 4 and 2, because each block has its own samples.
        num_ladder_steps: steps to the top.
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
    num_samples: int | None = static(default=None)
    num_slots: int | None = static(default=None)
    num_starts: int | None = static(default=None)
    num_ladders: int | None = static(default=None)
    num_ladder_steps: int = static(default=200)
    refresh: bool = static(default=True)
    chunk: int = static(default=1024)
    full_batch = True
    guarantees = ("sampled-value", "sampled-penalty", "sampled-kkt")
    about = About(
        idea="a penalty on g's value gap over samples of Y: g may be non-convex, Y(x) bounded and coupled",
        reference="arXiv:2505.10830, 2025",
        calls="thousands, on all samples",
        lower="any smooth g on a bounded Y(x), blocks of low dimension",
        stops="a bias like 1/lam and a gap of at most `lower_tol` stay",
    )

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
            if value is None and name in ("num_samples", "num_slots", "num_starts", "num_ladders"):
                continue
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

    def sizes(self, n: int) -> Sizes:
        """What is given, or the defaults for a problem of n blocks, 4 `MOST`/n in [`LEAST`, `MOST`]."""
        given = self.num_samples, self.num_slots, self.num_starts, self.num_ladders
        shared = (min(most, max(least, 4 * most // n)) for most, least in zip(MOST, LEAST, strict=True))
        return Sizes(*(default if own is None else own for own, default in zip(given, shared, strict=True)))

    def _count(self, n: int) -> int:
        """Samples of a lane: spread over Y; near the slots; the slots, or without refresh the joint form's y."""
        sizes = self.sizes(n)
        return sizes.samples + (sizes.samples // 2 + 2 * sizes.slots if self.refresh else int(self.form == "joint"))

    def init(self, problem: BilevelProblem, key: Array) -> State:
        problem = problem.on_full_data()
        key_start, key_x, key_y = jax.random.split(key, 3)
        x0, y0 = problem.init(key_start)
        x0, y0 = problem.x_set.project(x0), problem.y_set.project(y0)
        view = blocks(problem, y0)
        own = self.sizes(view.n)
        x, lanes = starts(problem.x_set, key_x, own.starts, x0), own.starts * own.ladders
        samples = cover_blocks(view, key_y, self._count(view.n))

        def spreads(x: PyTree) -> tuple[Array, Array]:
            f, g = view.values(x, samples, self.chunk)
            return jnp.std(jnp.sum(f, axis=1)), jnp.std(jnp.sum(g, axis=1))

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
        foot = first * (last / first) ** (jnp.arange(own.ladders, dtype=unit.dtype) / (2 * own.ladders))
        x = jax.tree.map(lambda leaf: jnp.repeat(leaf, own.ladders, axis=0), x)
        y, zero = repeat(y0, lanes), jnp.zeros(lanes, unit.dtype)
        rule = () if self.upper_step_size is None else jax.vmap(self.upper_step_size.init)((x, y))
        samples = repeat(samples, lanes)
        samples = samples.at[:, -1].set(view.pack(y0)) if self._movable else samples
        return State(
            x, y, samples, jnp.zeros((lanes, 2 * own.slots, view.n), unit.dtype), zero, rule,
            jnp.tile(foot, own.starts), last + zero, smooth, scales, jnp.zeros((), int),
        )  # fmt: skip

    @property
    def least_steps(self) -> int:
        return self.num_ladder_steps

    @property
    def _movable(self) -> bool:
        """Whether the last sample is y; the lifted form's frozen samples stay as they are."""
        return self.refresh or self.form == "joint"

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        climbed = jnp.minimum(state.count / self.num_ladder_steps, 1).astype(state.first.dtype)
        growth = (state.last / state.first) ** climbed
        rho, smooth, weight = state.first * growth, state.smooth / growth, jnp.sqrt(growth)
        view = blocks(problem, take(state.y, 0))
        own, shape = self.sizes(view.n), (view.n, 2 * view.m + 2)
        count = own.samples // 2 * shape[0] * shape[1] if self.refresh else 0
        u = jax.random.uniform(key, (len(rho) + 1, count + 1), rho.dtype)  # one draw: its program is long
        fresh, near = None, u[:-1, 1:].reshape(len(rho), -1, *shape)
        if self.refresh:
            fresh = renewal.fresh(view, u[-1, : view.n * view.m].reshape(view.n, view.m), own.samples, key)
        x, y, samples, sizes, size, rule, info = oracles.batched(partial(self._lane, problem, fresh, state.scales))(
            state.x, state.y, state.samples, state.sizes, state.size, state.rule, rho, smooth, weight, near, u[:-1, :1]
        )
        return state._replace(
            x=x, y=y, samples=samples, sizes=sizes, size=size, rule=rule, count=state.count + 1
        ), info  # fmt: skip

    def _lane(
        self, problem, fresh, scales, x, y, samples, sizes, size, state_of_rule, rho, smooth, weight, near, chance
    ):
        view = blocks(sampling.uncoupled(problem, weight * scales[0], scales[1]), y)
        joint, rule, slots = self.form == "joint", self.upper_step_size, len(sizes)
        if self.refresh:
            samples, sizes, f, g = renewal.renew(view, x, samples[-slots:], sizes, rho, fresh, near, joint, self.chunk)
            # the first slot becomes the least of g, the last one that of f + rho g or the variable y
            up = jnp.argmin(f + rho * g, axis=0)
            ends = jnp.stack([jnp.argmin(g, axis=0), jnp.full_like(up, len(f) - 1) if joint else up])
            put = lambda part: part.at[np.array([-slots, -1])].set(pick(part, ends))  # noqa: E731
            samples, f, g = map(put, (samples, f, g))
        else:
            f, g = view.values(x, samples, self.chunk)
        objective, a, b = self._penalised(f, g, rho, smooth)
        direction = self._direction(view, x, samples, a, b, rho)
        z = samples[-1]

        def project(x: PyTree, z: Array) -> tuple[PyTree, Array]:
            x = problem.x_set.project(x)
            return x, restore(view, x, z) if joint else z

        if rule is not None:
            pairs = (x, view.unpack(z)), (direction[0], view.unpack(direction[1]))
            (x, moved), state_of_rule = rule.apply(*pairs, state_of_rule)
            x, z = project(x, view.pack(moved))
            samples = samples.at[-1].set(z) if joint else samples
        else:

            def attempt(size: Array) -> tuple[Any, ...]:
                x1, z1 = project(*jax.tree.map(lambda p, d: p - size * d, (x, z), direction))
                ys = samples.at[-1].set(z1) if joint else samples
                if self.refresh:  # the best samples follow x, or else only other samples would be near them
                    ends = np.array([-slots] if joint else [-slots, -1])
                    weights = jnp.arange(len(ends), dtype=size.dtype), jnp.stack([jnp.ones_like(rho), rho])[: len(ends)]
                    follow = lambda y, a, b, s: improve(view, x1, y, a, b, TRACK, s)[0]  # noqa: E731
                    ys = ys.at[ends].set(oracles.batched(follow)(ys[ends], *weights, sizes[ends]))
                f1, g1 = view.values(x1, ys, self.chunk)
                value = self._penalised(f1, g1, rho, smooth)[0]
                return x1, ys, f1, g1, jnp.where(jnp.isfinite(value), value, jnp.inf)

            length = norm(direction)
            reach = (1 + norm(x)) / jnp.where(length > 0, length, 1)
            chance = reach * 10 ** (-6 * chance)
            tries = jnp.where(size > 0, size, reach / 80) * jnp.asarray(LENGTHS, size.dtype)
            tries = jnp.concatenate([chance, tries])
            tried = oracles.batched(attempt)(tries)
            k = jnp.argmin(tried[-1])
            x, samples, f, g, objective = take(tried, k)
            size = jnp.clip(jnp.where(tries[k] > 0, tries[k], tries[-2] / 8), 1e-9 * reach, reach)
        best = jnp.argmin(f + rho * g, axis=0)
        z = samples[-1] if joint else pick(samples, best)
        gap = jnp.sum((g[-1] if joint else pick(g, best)) - jnp.min(g, axis=0))
        if self.refresh:
            z = restore(view, x, z, RESTORES)  # the samples were moved into Y(x) before x moved
        samples = samples.at[-1].set(z) if self._movable else samples
        return x, view.unpack(z), samples, sizes, size, state_of_rule, Info(objective, rho, gap)

    def _penalised(self, f: Array, g: Array, rho: Array, smooth: Array) -> tuple[Array, Array, Array]:
        """(P, weights of the minimum over f + rho g, weights of that over g) at temperature rho t = smooth, [N, n]."""
        least = jax.vmap(lambda values, t: smooth_min(values, t, self.smoothing == "entropic"), (1, None), (0, 1))
        frozen_joint = self.form == "joint" and not self.refresh  # y is then no sample of v
        v, b = least(g.at[-1].set(jnp.inf) if frozen_joint else g, smooth / rho)
        if self.form == "joint":
            return jnp.sum(f[-1] + rho * (g[-1] - v)), jnp.zeros_like(f).at[-1].set(1), b
        u, a = least(f + rho * g, smooth)
        return jnp.sum(u - rho * v), a, b

    def _direction(self, view: Blocks, x: PyTree, samples: Array, a: Array, b: Array, rho: Array):
        """The gradient of P in x, and in the last sample for the joint form; with the multipliers of coupled samples.

        As x moves, a sample at active rows c(x, y_i) = 0 moves with them: its a f + b g changes at the rate of its
        Lagrangian, a f_x + b g_x + lam' c_x.
        """
        if view.problem.coupling is None:
            by_x, by_y = view.gradients(x, samples, a, rho * (a - b), self.chunk)
        else:
            by_x, by_y = view.gradients(x, samples, a, rho * a, self.chunk)
            minus, low = view.gradients(x, samples, jnp.zeros_like(b), rho * b, self.chunk)
            heavy = lax.top_k(jnp.max(jnp.maximum(a, b), axis=1), min(HEAVY, len(a)))[1]
            look = lambda y, plus, minus: multipliers(view, x, y, jnp.stack([plus[0], minus[0]]))  # noqa: E731
            ys = samples[heavy]
            lam = jax.vmap(look)(ys, by_y[heavy], low[heavy])
            pull = sample_oracles.coupling_pull(view.problem, x, view.stack(ys), lam[:, 0] - lam[:, 1])[0]
            by_x = jax.tree.map(lambda up, low, row: up - low + row, by_x, minus, pull)
        return by_x, by_y[-1] if self.form == "joint" else jnp.zeros_like(by_y[-1])

    def output(self, problem: BilevelProblem, state: State) -> tuple[PyTree, PyTree]:
        return _output(problem, self, state)

    def cost(self, problem: BilevelProblem) -> OracleCount:
        view = blocks(problem, problem.init(jax.random.key(0))[1])
        own, m, count = self.sizes(view.n), view.m, self._count(view.n)
        lanes, slots = own.starts * own.ladders, 2 * own.slots if self.refresh else 0
        trials = 1 + len(LENGTHS) if self.upper_step_size is None else 0
        tracked = trials * TRACK * (1 + (self.form == "lifted")) * self.refresh
        values = count * (1 + trials) + slots + tracked * (len(NEWTON) + len(SIZES) + 1)
        gradients = count * (1 + (problem.coupling is not None)) + slots + tracked
        values, gradients, hvps = (lanes * n for n in (values, gradients, 2 * tracked * min(m, MAX_CG)))
        return OracleCount(values, gradients, values, gradients, hvps)

    def referee(self, problem: BilevelProblem) -> Referee | None:
        return BY_VALUE if problem.constrained_lower else None

    def unsupported(self, problem: BilevelProblem) -> str | None:
        if problem.coupling is not None and not self.refresh:
            return (
                f"SampledPenalty with refresh=False keeps its samples, which Y(x) would have to move; got "
                f"{type(problem.coupling).__name__}. Use refresh=True."
            )
        return refuse_unbounded_set(self, problem)


@jax.jit
def _output(problem: BilevelProblem, solver: SampledPenalty, state: State) -> tuple[PyTree, PyTree]:
    problem, slots = problem.on_full_data(), state.sizes.shape[1]
    view = blocks(problem, take(state.y, 0))
    return answer.best(view, state.x, state.y, state.samples[:, -slots:], solver.lower_tol.value, solver.chunk)
