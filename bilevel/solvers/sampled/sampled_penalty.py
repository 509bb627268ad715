"""SampledPenalty: a value-function penalty over samples of a lower level that is non-convex and constrained."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import oracles
from bilevel.backend.tree import repeat, take
from bilevel.diagnostics import BY_VALUE
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount, Referee
from bilevel.sampled import answer, line_search, refine, renewal
from bilevel.sampled.blocks import Blocks, pick, uncoupled
from bilevel.sampled.covering import cover_blocks, starts
from bilevel.sampled.domain import into_domain
from bilevel.sampled.dual import MAX_CG
from bilevel.sampled.feasible import is_near, restore
from bilevel.sampled.line_search import Place
from bilevel.sampled.penalised import Direction, Form, Penalised, Rung
from bilevel.sampled.smoothing import Smoothness
from bilevel.solver import About, Solver, refuse_unbounded_set
from bilevel.step import Scalar, StepSize, as_step, require_numbers, step_sizes
from bilevel.struct import invalid, static, struct

PyTree = Any
FIRST_TEMPERATURE, FIRST_PENALTY, LAST_PENALTY = 0.1, 1e-2, 1e4  # in units of the objectives' spreads at the start
MOST, LEAST = (64, 8, 8, 3), (16, 4, 4, 2)  # default samples, slots, starts and ladders: of one block, of many


class State(NamedTuple):
    """What a step needs, stacked over L = num_starts num_ladders lanes; lane i is start i // num_ladders."""

    x: PyTree
    """The upper iterates."""
    y: PyTree
    """The lower iterates."""
    samples: Array
    """Points of Y, shape [L, N, n, m]; the last 2 num_slots of them are the slots, the very last one is y."""
    sizes: Array
    """The lengths of the slots' steps, shape [L, 2 num_slots, n], 0 where none is known."""
    size: Array
    """The length of x's last step, shape [L], 0 where none is known."""
    rule: PyTree
    """The step rule's state."""
    first: Array
    """rho at the foot of each lane's ladder, shape [L]."""
    last: Array
    """rho at its top, shape [L]."""
    smooth: Array
    """rho t at the foot of the lowest ladder, shape []; not stacked."""
    scales: tuple[Array, Array]
    """The spreads of f and of g over the samples at the starts, shapes []; not stacked."""
    count: Array
    """Steps done, shape []; not stacked."""


class Lane(NamedTuple):
    """What a step changes of one lane: fields of `State`, without the axis of lanes."""

    x: PyTree
    y: PyTree
    samples: Array
    sizes: Array
    size: Array
    rule: PyTree


class Noise(NamedTuple):
    """A lane's random numbers, uniform in [0, 1)."""

    near: Array
    """For points near the slots, shape [num_samples // 2, n, 2 m + 2]; empty without refresh."""
    length: Array
    """For a random length of the line search, shape [1]."""


class Sizes(NamedTuple):
    """How many there are of what; lanes = starts ladders."""

    samples: int
    """Fresh samples of a lane."""
    slots: int
    """Slots of each kind."""
    starts: int
    """Starts in x."""
    ladders: int
    """Ladders for each start."""


class Info(NamedTuple):
    """What a step of SampledPenalty shows of its L lanes, shapes [L]."""

    objective: Array
    """The penalised objective P."""
    penalty: Array
    """The penalty rho."""
    gap: Array
    """g(x, y) less the least g of the samples."""
    radius: Array
    """Covering radius: how far a new sample was at most from the nearest other one; 0 without refresh."""


@struct(kw_only=True)
class SampledPenalty(Solver):
    """Experimental: written from the abstract of arXiv:2505.10830 alone.

    Gradient descent on f plus rho times the lower gap, with v(x) = min g(x, .) taken over samples y_i of Y:

        lifted:  P(x) = M_{rho t}[f_i + rho g_i](x) - rho M_t[g_i](x),                  y = the best y_i of the first
        joint:   P(x, y) = f(x, y) + rho (g(x, y) - M_t[g_i](x))
        x (and y) <- Proj(x - s grad P),    f_i = f(x, y_i),    g_i = g(x, y_i),

    M the entropic or quadratic smoothed minimum of `sampled.smoothing`. The lifted P has no minimum that comes only
    from a local minimiser of g; the joint one has one for each. Over the steps rho climbs a ladder from `penalty` to
    `max_penalty` while rho t falls like 1/rho. There are num_starts times num_ladders independent lanes, which start
    at points of X and on different rungs, for each start one at the top, since low penalties draw all x together;
    `output` takes the best lane. A separable problem (`bilevel.Separable`) has these minima and samples for each block.

    Samples are renewed at each step, N fixed: fresh Sobol points of Y and its boundary, points near the slots, and the
    slots. Half of the slots descend g(x, .), some of these away from the best one, and half f + rho g, y among them;
    each moves to the best of its share of the new points where that is lower. In a trial of the line search the best
    slot of either kind takes TRACK truncated Newton steps (`refine.improve`). With `refresh=False` the samples stay
    as drawn and P is a fixed function. Samples of a coupled Y(x) are in it at each x that is looked at, and P's
    gradient has their motion (`sampled.feasible`); where affine rows leave Y(x) empty, x is moved to where it is not.
    Other rows are met nearly, f and g have the squared violation that is left. Frozen samples have no coupling.

    `output` polishes y to a minimiser of g(x, .) over Y(x), checks it against g at other points, and takes the lane of
    least f with a gap of at most `lower_tol`. Where the polished y is worse by more than 1e-3 (1 + |f|), it is the
    sample before polishing, if its gap is as small: so the optimum is found where it sits at an isolated x.

    Assumptions: f and g smooth, Y bounded, g of few minima: the best of 3 is found in 24 unknowns, of 3^m not in 8.
    Guarantee, with `from_theory`: min_k |G_k|^2 <= 2 L (P_0 - inf P)/K for the gradient mapping G of P.
    Cost per step: L (7 N + 2 num_slots + 156) values, L (N + 2 num_slots + 24) gradients of f and of g, 48 L m HVPs,
    with N samples a lane in m dimensions (2 N gradients with a coupling); most of it is the line search's.

    Args:
        upper_step_size: s > 0. A number, an optax schedule or an optax transformation. Default: the best of five
            lengths, one of them random, and of staying, all tried at once.
        penalty: rho > 0 at the foot of the lowest ladder. Default: 1/100 of the spread (standard deviation over the
            samples) of f over that of g, at the starts.
        max_penalty: rho > 0 at the top. Default: 1e4 times that ratio.
        temperature: rho t > 0 at the foot, in units of f. Default: 0.1 times the spread of f.
        lower_tol: > 0, the lower gap that `output` accepts. Default: 1e-5.
        form: "lifted" or "joint". Default: "lifted".
        smoothing: "entropic" or "quadratic". Default: "entropic".
        num_samples: fresh samples, >= 8. Default: 64; of n > 4 blocks 4/n of that, at least 16.
        num_slots: slots of each kind, >= 1. Default: 8; of n > 4 blocks 4/n of that, at least 4.
        num_starts: lanes in x, >= 1; the first is init's x0. Default: 8; of n > 4 blocks 4/n of that, at least 4.
        num_ladders: >= 1, for each start. Default: 3; of n > 4 blocks 4/n of that, at least 2.
        num_ladder_steps: steps to the top, >= 1. Default: 200.
        refresh: whether samples are renewed. Default: True.
        chunk: samples of a lane in memory at once, >= 1. Default: 1024.

    Reference: A discretization approach for bilevel optimization with low-dimensional and non-convex lower-level. 2025,
        arXiv:2505.10830. From its abstract alone: sampled feasible points, a convexified value function, a penalty.
    Differs from the paper: everything beyond that is derived here: the lifted form, the smoothing, ladders, refresh,
        polish, the treatment of Y(x) and the constants of `from_theory`.
    """

    upper_step_size: StepSize | None = None
    penalty: Scalar | None = None
    max_penalty: Scalar | None = None
    temperature: Scalar | None = None
    lower_tol: Scalar = 1e-5
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
    experimental = "written from the abstract of arXiv:2505.10830 alone"

    def __post_init__(self) -> None:
        """Check the step size, the numbers and the choices."""
        step_sizes(self, "upper_step_size")
        require_numbers(self, "penalty", "max_penalty", "temperature", "lower_tol")
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
        """Frozen samples, rho = 1/epsilon, t = epsilon^2/log N and s = 1/L with the smoothness L of P,

            joint:  L = L_f + 2 rho L_g + rho D_g^2/(4 t),
            lifted: L = L_f + 2 rho L_g + rho D_g^2/(4 t) + (D_f + rho D_g)^2/(4 rho t),

        with the constants of `sampled.Smoothness`. Then min_k |G_k|^2 <= 2 L (P_0 - inf P)/K, so that
        K = O(epsilon^-5) steps up to logarithms give |G| <= epsilon; and v_N - epsilon^2 <= M_t[g_i] <= v_N.

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
        view = Blocks.of(problem, y0)
        own = self.sizes(view.n)
        x, lanes = starts(problem.x_set, key_x, own.starts, x0), own.starts * own.ladders
        x = jax.vmap(lambda x: into_domain(view, x, view.pack(y0)))(x)
        samples = cover_blocks(view, key_y, self._count(view.n))

        def spreads(x: PyTree) -> tuple[Array, Array]:
            f, g = view.values(x, samples, self.chunk)
            return jnp.std(jnp.sum(f, axis=1)), jnp.std(jnp.sum(g, axis=1))

        scales = jax.tree.map(jnp.mean, jax.vmap(spreads)(x))
        scales = jax.tree.map(lambda s: jnp.where((s > 0) & jnp.isfinite(s), s, 1), scales)
        unit = scales[0] / scales[1]
        first, last, smooth = (
            default if given is None else jnp.asarray(given, unit.dtype)
            for given, default in (
                (self.penalty, FIRST_PENALTY * unit),
                (self.max_penalty, LAST_PENALTY * unit),
                (self.temperature, FIRST_TEMPERATURE * scales[0]),
            )
        )
        height = np.append(np.arange(max(own.ladders - 1, 1)) / (2 * own.ladders), 1.0)[: own.ladders]
        foot = first * (last / first) ** jnp.asarray(height, unit.dtype)
        x = jax.tree.map(lambda leaf: jnp.repeat(leaf, own.ladders, axis=0), x)
        y, zero = repeat(y0, lanes), jnp.zeros(lanes, unit.dtype)
        rule = () if self.upper_step_size is None else jax.vmap(as_step(self.upper_step_size).init)((x, y))
        samples = repeat(samples.at[-1].set(view.pack(y0)) if self._movable else samples, lanes)
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
        view, rungs = Blocks.of(problem, take(state.y, 0)), self._rungs(state)
        fresh, noise = self._draw(view, key, rungs.rho)
        lanes = Lane(*(getattr(state, name) for name in Lane._fields))
        lanes, info = oracles.batched(partial(self._lane, problem, state.scales, fresh))(lanes, rungs, noise)
        return state._replace(**lanes._asdict(), count=state.count + 1), info

    def _rungs(self, state: State) -> Rung:
        """Where each lane is on its ladder: rho climbs geometrically, rho t falls as it grows; shapes [L]."""
        climbed = jnp.minimum(state.count / self.num_ladder_steps, 1).astype(state.first.dtype)
        rho = state.first * (state.last / state.first) ** climbed
        return Rung(rho, state.smooth * state.first[0] / rho, jnp.sqrt(rho / state.first[0]))

    def _draw(self, view: Blocks, key: Array, rho: Array) -> tuple[Array | None, Noise]:
        """(fresh points of Y for all lanes, [num_samples, n, m], None without refresh; each lane's noise)."""
        num, shape = self.sizes(view.n).samples, (view.n, 2 * view.m + 2)
        count = num // 2 * shape[0] * shape[1] if self.refresh else 0
        u = jax.random.uniform(key, (len(rho) + 1, count + 1), rho.dtype)  # one draw: its program is long
        fresh = None
        if self.refresh:
            fresh = renewal.fresh(view, u[-1, : view.n * view.m].reshape(view.n, view.m), num, key)
        return fresh, Noise(u[:-1, 1:].reshape(len(rho), -1, *shape), u[:-1, :1])

    def _lane(
        self,
        problem: BilevelProblem,
        scales: tuple[Array, Array],
        fresh: Array | None,
        lane: Lane,
        rung: Rung,
        noise: Noise,
    ) -> tuple[Lane, Info]:
        """One lane's step: samples, the gradient of P over them, x, y. scales: of f and g; fresh: points of Y."""
        view = Blocks.of(uncoupled(problem, rung.weight * scales[0], scales[1]), lane.y)
        P = Penalised(view, self._form, rung.rho, rung.smooth, self.chunk)
        samples, sizes, lift, radius, outside = self._samples(P, lane, fresh, noise)
        found = P.at(samples.f, samples.g)
        direction = P.gradient(lane.x, samples, lift, found)
        here = Place(lane.x, samples.points, samples.f, samples.g, found.value, outside)
        if self.upper_step_size is None:
            here, size = line_search.search(P, here, direction, sizes, lane.size, noise.length)
            lane = lane._replace(size=size)
        else:
            here, rule = self._move(P, here, direction, lane)
            lane = lane._replace(rule=rule)
        y, gap = self._settle(P, here)
        points = here.points.at[-1].set(y) if self._movable else here.points
        lane = lane._replace(x=here.x, y=view.unpack(y), samples=points, sizes=sizes)
        return lane, Info(here.value, rung.rho, gap, radius)

    def _samples(self, P: Penalised, lane: Lane, fresh: Array | None, noise: Noise) -> renewal.Renewed:
        """The samples at x. The first slot becomes the least of g, the last one that of f + rho g or the variable y."""
        if fresh is None:
            f, g = P.view.values(lane.x, lane.samples, self.chunk)
            samples = renewal.Samples(lane.samples, f, g, lane.samples[..., :0])
            return renewal.Renewed(samples, lane.sizes, samples.points[:0], jnp.zeros_like(f[0, 0]), jnp.array(False))
        slots = renewal.Slots(lane.samples[-len(lane.sizes) :], lane.sizes)
        found = renewal.renew(P.view, lane.x, slots, P.rho, fresh, noise.near, P.form.joint, self.chunk)
        samples = found.samples
        low, up = jnp.argmin(samples.g, axis=0), jnp.argmin(samples.f + P.rho * samples.g, axis=0)
        ends = jnp.stack([low, jnp.full_like(up, len(samples.f) - 1) if P.form.joint else up])
        put = lambda part: part.at[np.array([-len(lane.sizes), -1])].set(pick(part, ends))  # noqa: E731
        return found._replace(samples=renewal.Samples(*map(put, samples)))

    def _move(self, P: Penalised, here: Place, direction: Direction, lane: Lane) -> tuple[Place, PyTree]:
        """(the place after a step of `upper_step_size`, with the values from before it; the rule's next state)."""
        assert self.upper_step_size is not None
        pairs = (here.x, P.view.unpack(here.points[-1])), (direction.x, P.view.unpack(direction.last))
        (x, moved), rule = as_step(self.upper_step_size).apply(*pairs, lane.rule)
        x, points, fits, outside = line_search.arrive(P, here, direction, x, P.view.pack(moved), len(lane.sizes))
        f, g = (jnp.where(fits, part, jnp.inf) for part in (here.f, here.g))
        return here._replace(x=x, points=points, f=f, g=g, outside=outside), rule

    def _settle(self, P: Penalised, here: Place) -> tuple[Array, Array]:
        """(y [n, m]: the variable, or the best sample of f + rho g, in Y(x); its g less the least sample's)."""
        best = jnp.argmin(here.f + P.rho * here.g, axis=0)
        y, g = (part[-1] if P.form.joint else pick(part, best) for part in (here.points, here.g))
        return (restore(P.view, here.x, y) if is_near(P.view) else y), jnp.sum(g - jnp.min(here.g, axis=0))

    @property
    def _form(self) -> Form:
        return Form(self.form == "joint", self.smoothing == "entropic", not self.refresh)

    def output(self, problem: BilevelProblem, state: State) -> tuple[PyTree, PyTree]:
        return _output(problem, self, state)

    def cost(self, problem: BilevelProblem) -> OracleCount:
        view = Blocks.of(problem, problem.init(jax.random.key(0))[1])
        own, m, count = self.sizes(view.n), view.m, self._count(view.n)
        lanes, slots = own.starts * own.ladders, 2 * own.slots if self.refresh else 0
        trials = 1 + len(line_search.LENGTHS) if self.upper_step_size is None else 0
        ends = trials * (1 + (self.form == "lifted")) * self.refresh
        tracked, looks = ends * line_search.TRACK, len(refine.LENGTHS) + len(refine.SIZES) + 1
        values = count * (1 + trials) + slots + tracked * looks + ends
        gradients = count * (1 + (problem.coupling is not None)) + slots + tracked
        values, gradients, hvps = (lanes * n for n in (values, gradients, 2 * tracked * min(m, MAX_CG)))
        return OracleCount(values, gradients, values, gradients, hvps)

    def referee(self, problem: BilevelProblem) -> Referee | None:
        return BY_VALUE if problem.constrained_lower else None

    def unsupported(self, problem: BilevelProblem) -> str | None:
        if problem.coupling is not None and not self.refresh:
            kind = type(problem.coupling).__name__
            return f"SampledPenalty with refresh=False keeps its samples, and {kind} moves Y(x). Use refresh=True."
        return refuse_unbounded_set(self, problem)


@jax.jit
def _output(problem: BilevelProblem, solver: SampledPenalty, state: State) -> tuple[PyTree, PyTree]:
    problem, slots = problem.on_full_data(), state.sizes.shape[1]
    view = Blocks.of(problem, take(state.y, 0))
    return answer.best(view, state.x, state.y, state.samples[:, -slots:], solver.lower_tol, solver.chunk)
