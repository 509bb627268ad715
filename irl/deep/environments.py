"""Environments behind one protocol of pure functions: gymnax inside jit, Gymnasium's MuJoCo through a pure callback.

    state, observation = environment.reset(key)
    state, timestep = environment.step(state, action, key)      # Timestep(observation, reward, terminated, truncated)

`terminated`: the process ended, and nothing follows (its value is 0). `truncated`: only the watching ended, at
`max_steps` steps; the value goes on. They are never both true. Continuous actions lie in [-1, 1]^k and are scaled to
the environment's own bounds; discrete ones are whole numbers. One state stands for one environment: `jax.vmap` makes
many. Nothing here resets by itself, and what `step` returns is the observation *before* any reset.

Pure means that a run repeats and resumes to the bit, whoever steps: MuJoCo's whole state travels through JAX as an
array, and one simulator on the host serves every environment of that name.
"""

import functools
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.struct import invalid, static, struct
from irl.mdp import MDP

PyTree = Any
GYMNAX = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCarContinuous-v0")
MUJOCO = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5")


class Timestep(NamedTuple):
    """What an environment shows after a step, before any reset."""

    observation: Array
    """[d]."""
    reward: Array
    """[]."""
    terminated: Array
    """Whether the process ended, [] bool."""
    truncated: Array
    """Whether only the watching ended, [] bool."""


class Environment:
    """The protocol, a pytree."""

    observation_size: int
    """The number d of entries of an observation."""
    num_actions: int | None
    """The number A of actions, or None where they are continuous."""
    action_size: int
    """The number k of entries of an action, or A where actions are discrete and networks see them one-hot."""
    max_steps: int
    """The time limit of an episode."""
    bounds: tuple[Any, Any] = (-1.0, 1.0)
    """What the actions -1 and 1 are in the environment's own units: numbers, or arrays [k]."""

    def reset(self, key: Array) -> tuple[PyTree, Array]:
        """(state, observation [d]) at the start of an episode."""
        raise NotImplementedError

    def step(self, state: PyTree, action: Array, key: Array) -> tuple[PyTree, Timestep]:
        """(next state, timestep) of an action, [k] in [-1, 1] or a whole number []."""
        raise NotImplementedError


def make(name: str, *, absorbing: bool = False, max_steps: int | None = None, **changes: Any) -> Environment:
    """The environment of a name, from gymnax where it is one of `GYMNAX`, else from Gymnasium's MuJoCo.

    Args:
        name: "Pendulum-v1", "Hopper-v5", …
        absorbing: add the absorbing state of `Absorbing`.
        max_steps: the time limit; default the environment's own.
        changes: of gymnax parameters (`m=2.0` for a heavier pendulum), or arguments of `gymnasium.make`.

    Raises:
        InvalidInput: where the package is missing, or the name or a change is unknown to it.
    """
    inner = _gymnax(name, max_steps, changes) if name in GYMNAX else _gymnasium(name, max_steps, changes)
    return Absorbing(inner) if absorbing else inner


def missing(name: str, package: str, error: ImportError) -> NoReturn:
    """Say how to get the package that an environment needs."""
    do = f"Install it: pip install 'bilevax[rl]' (importing it said: {error})."
    invalid("name (irl.environments.make)", repr(name), f"the package {package}", do)


@functools.cache
def _gymnax_class(name: str) -> tuple[Any, Any]:
    try:
        import gymnax
    except ImportError as error:
        missing(name, "gymnax", error)
    return gymnax.make(name)


def _gymnax(name: str, max_steps: int | None, changes: dict[str, Any]) -> "Gymnax":
    env, params = _gymnax_class(name)
    for key in changes:
        if not hasattr(params, key):
            known = ", ".join(sorted(vars(params)))
            invalid(f"{key} (irl.environments.make)", changes[key], f"a parameter of {name}", f"They are {known}.")
    max_steps = int(params.max_steps_in_episode) if max_steps is None else max_steps
    params = params.replace(max_steps_in_episode=max_steps, **changes)
    discrete = hasattr(env.action_space(params), "n")
    size = int(np.prod(env.observation_space(params).shape))
    bounds = (0.0, 0.0) if discrete else (float(env.action_space(params).low), float(env.action_space(params).high))
    params = jax.tree.map(_strong, params)
    return Gymnax(params, env, size, env.num_actions if discrete else None, env.num_actions, max_steps, bounds)


def _strong(leaf: Any) -> Array:
    """An array in default precision, never weakly typed."""
    kind = np.asarray(leaf).dtype.kind
    return jnp.asarray(np.asarray(leaf), {"f": float, "i": int, "u": int, "b": bool}[kind])


@struct
class Gymnax(Environment):
    """An environment of gymnax; its parameters are leaves, so that another mass or length compiles nothing."""

    params: Any
    env: Any = static()
    observation_size: int = static()
    num_actions: int | None = static()
    action_size: int = static()
    max_steps: int = static()
    bounds: tuple[float, float] = static()

    def reset(self, key: Array) -> tuple[PyTree, Array]:
        with _relaxed():
            observation, state = self.env.reset_env(key, self.params)
        return jax.tree.map(_floats, state), jnp.asarray(observation, float)

    def step(self, state: PyTree, action: Array, key: Array) -> tuple[PyTree, Timestep]:
        if self.num_actions is None:
            low, high = self.bounds
            action = low + (action[0] + 1) * ((high - low) / 2)
        with _relaxed():
            observation, after, reward, terminated, _ = self.env.step_env(key, state, action, self.params)
            truncated = self.env.is_truncated(after, self.params) & ~terminated
        after = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype).reshape(old.shape), after, state)
        return after, Timestep(jnp.asarray(observation, float), jnp.asarray(reward, float), terminated, truncated)


def _floats(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(float if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)


class _relaxed:
    """A context in which dtypes and ranks are promoted freely, as gymnax, whose code mixes them, needs."""

    def __enter__(self) -> None:
        self.contexts = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


class Simulator:
    """The one simulator on the host for a Gymnasium MuJoCo environment: steps any state that it is given.

    A row of states holds MuJoCo's integration state, the positions that lag behind it, the time and an end mark, as
    float64 in pairs of uint32, which JAX carries unchanged in every precision.
    """

    def __init__(self, name: str, changes: dict[str, Any]) -> None:
        """Make the simulator, and check that a step depends on the row and the action alone."""
        try:
            import gymnasium
            import mujoco
        except ImportError as error:
            missing(name, "gymnasium with mujoco", error)
        self.mujoco: Any = mujoco  # whose stubs, like Gymnasium's, leave out most of what is used here
        try:
            env: Any = gymnasium.make(name, **changes)
        except (gymnasium.error.Error, TypeError) as error:
            known = ", ".join(GYMNAX + MUJOCO)
            invalid("name (irl.environments.make)", f"{name!r}: {error}", f"one of {known}, …", "See Gymnasium's list.")
        self.env, self.limit = env.unwrapped, env.spec.max_episode_steps
        if not (hasattr(self.env, "data") and hasattr(self.env, "model") and hasattr(self.env, "frame_skip")):
            do = "Other environments need a class with Environment's members, written in JAX."
            invalid("name (irl.environments.make)", repr(name), "an environment of Gymnasium's MuJoCo", do)
        self.signature = self.mujoco.mjtState.mjSTATE_INTEGRATION
        self.core = self.mujoco.mj_stateSize(self.env.model, self.signature)
        self.size = self.core + self.env.data.xpos.size + self.env.data.xipos.size + 2
        self.low, self.high = self.env.action_space.low, self.env.action_space.high
        self.observation_size = int(np.prod(self.env.observation_space.shape))
        self._check_pure(name)

    def _check_pure(self, name: str) -> None:
        row, _ = self._reset(0)
        action = np.full(self.low.shape, 0.5)
        for _ in range(3):
            row, *first = self._step(row, action, 10**6)
        start = row
        row, *first = self._step(start, action, 10**6)
        for _ in range(5):
            self._step(self._reset(1)[0], -action, 10**6)
        again, *second = self._step(start, action, 10**6)
        if not (np.array_equal(row, again) and all(map(np.array_equal, first, second))):
            do = "Its state is more than MuJoCo's; wrap it in a class of your own."
            invalid("name (irl.environments.make)", repr(name), "a step that is a function of MuJoCo's state", do)

    def _get(self, time: float, ended: bool) -> np.ndarray:
        row = np.empty(self.size)
        self.mujoco.mj_getState(self.env.model, self.env.data, row[: self.core], self.signature)
        data = self.env.data
        row[self.core : -2] = np.concatenate([data.xpos.ravel(), data.xipos.ravel()])
        row[-2:] = time, ended
        return row

    def _reset(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        observation, _ = self.env.reset(seed=seed)
        return self._get(0, False), observation

    def _step(self, row: np.ndarray, action: np.ndarray, limit: int) -> tuple[Any, ...]:
        data, half = self.env.data, (self.size - 2 - self.core) // 2
        self.mujoco.mj_setState(self.env.model, data, row[: self.core], self.signature)
        data.xpos[:] = row[self.core : self.core + half].reshape(data.xpos.shape)
        data.xipos[:] = row[self.core + half : -2].reshape(data.xipos.shape)
        scaled = self.low + (np.clip(action, -1, 1) + 1) * ((self.high - self.low) / 2)
        observation, reward, terminated, _, _ = self.env.step(scaled)
        time = row[-2] + 1
        truncated = time >= limit and not terminated
        return self._get(time, terminated or truncated), observation, reward, bool(terminated), bool(truncated)

    def reset(self, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rows [..., 2 size] uint32, observations [..., d]) for seeds [...]."""
        seeds = np.asarray(seeds)
        pairs = [self._reset(int(seed)) for seed in seeds.ravel()]
        rows, observations = (np.stack(part) for part in zip(*pairs, strict=True))
        return rows.view(np.uint32).reshape(*seeds.shape, -1), observations.reshape(*seeds.shape, -1)

    def step(self, rows: np.ndarray, actions: np.ndarray, limit: int) -> tuple[np.ndarray, ...]:
        """(rows, observations, rewards, terminated, truncated); an ended row stays as it is, with zeros."""
        rows, actions = np.asarray(rows), np.asarray(actions, float)
        lanes = rows.shape[:-1]
        flat = np.ascontiguousarray(rows).view(np.float64).reshape(-1, self.size)
        nothing = np.zeros(self.observation_size)
        results = [
            (row, nothing, 0.0, False, False) if row[-1] else self._step(row, action, limit)
            for row, action in zip(flat, actions.reshape(len(flat), -1), strict=True)
        ]
        out = [np.stack(part) for part in zip(*results, strict=True)]
        out[0] = out[0].view(np.uint32)
        return tuple(part.reshape(*lanes, *part.shape[1:]) for part in out)


@functools.cache
def _simulator(name: str, changes: tuple[tuple[str, Any], ...]) -> Simulator:
    return Simulator(name, dict(changes))


def _gymnasium(name: str, max_steps: int | None, changes: dict[str, Any]) -> "Gymnasium":
    simulator = _simulator(name, tuple(sorted(changes.items())))
    limit: Any = simulator.limit if max_steps is None else max_steps
    return Gymnasium(simulator, simulator.observation_size, None, simulator.low.size, limit)


@struct
class Gymnasium(Environment):
    """A MuJoCo environment of Gymnasium. A state is a row of `Simulator`; stepping an ended one changes nothing."""

    simulator: Simulator = static()
    observation_size: int = static()
    num_actions: int | None = static()
    action_size: int = static()
    max_steps: int = static()

    @property
    def bounds(self) -> tuple[Any, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.simulator.low, self.simulator.high

    def reset(self, key: Array) -> tuple[Array, Array]:
        row = jax.ShapeDtypeStruct((2 * self.simulator.size,), jnp.uint32)
        observation = jax.ShapeDtypeStruct((self.observation_size,), _float())
        seed = jax.random.bits(key, (), jnp.uint32)
        host = _Host(self.simulator.reset, (row, observation))
        return jax.pure_callback(host, (row, observation), seed, vmap_method="broadcast_all")

    def step(self, state: Array, action: Array, key: Array) -> tuple[Array, Timestep]:
        of = jax.ShapeDtypeStruct
        shapes = of(state.shape, state.dtype), of((self.observation_size,), _float()), of((), _float())
        shapes += of((), jnp.bool), of((), jnp.bool)
        host = _Host(functools.partial(self.simulator.step, limit=self.max_steps), shapes)
        state, *timestep = jax.pure_callback(host, shapes, state, action, vmap_method="broadcast_all")
        return state, Timestep(*timestep)


class _Host:
    """A function of NumPy arrays whose results are cast to the dtypes that the callback announced."""

    def __init__(self, function: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> None:
        self.function, self.dtypes = function, [shape.dtype for shape in shapes]

    def __call__(self, *args: Any) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(out, d) for out, d in zip(self.function(*args), self.dtypes, strict=True))


def _float() -> Any:
    return jnp.zeros((), float).dtype


@struct
class Tabular(Environment):
    """A discounted `MDP` with a known reward [S, A]: one-hot observations [S], episodes of `max_steps` steps."""

    mdp: MDP
    rewards: Any
    max_steps: int = static()

    @property
    def observation_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.mdp.num_states

    @property
    def num_actions(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.mdp.num_actions

    @property
    def action_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.mdp.num_actions

    def reset(self, key: Array) -> tuple[PyTree, Array]:
        state = self.mdp.sample_start(key)
        return (state, jnp.zeros((), int)), jax.nn.one_hot(state, self.mdp.num_states)

    def step(self, state: PyTree, action: Array, key: Array) -> tuple[PyTree, Timestep]:
        here, time = state
        after = self.mdp.sample_next(key, here, action).astype(here.dtype)
        observation = jax.nn.one_hot(after, self.mdp.num_states)
        timestep = Timestep(observation, self.rewards[here, action], jnp.array(False), time + 1 >= self.max_steps)
        return (after, time + 1), timestep


@struct
class Absorbing(Environment):
    """`environment` without ends: where it terminates, the state is absorbed, and stays so with reward 0.

    It is there against survival bias. Without it the learned reward is 0 after an end, whatever the reward network
    says, so that positive rewards pay for living longer. Observations have one more entry, 1 in the absorbing state,
    whose other entries are 0: the reward there is learned like any other. An absorbed state steps once to itself and is
    then truncated, since nothing new would follow: `rollouts.weights` counts that step for all the later ones.
    """

    environment: Any

    @property
    def observation_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.environment.observation_size + 1

    @property
    def num_actions(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.environment.num_actions

    @property
    def action_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.environment.action_size

    @property
    def max_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.environment.max_steps

    @property
    def bounds(self) -> tuple[Any, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.environment.bounds

    def reset(self, key: Array) -> tuple[PyTree, Array]:
        state, observation = self.environment.reset(key)
        return (state, jnp.array(False)), extend(observation, False)

    def step(self, state: PyTree, action: Array, key: Array) -> tuple[PyTree, Timestep]:
        inner, absorbed = state
        inner, t = self.environment.step(inner, action, key)
        after = absorbed | t.terminated
        timestep = Timestep(
            extend(t.observation, after), jnp.where(absorbed, 0, t.reward), jnp.array(False),
            absorbed | (t.truncated & ~t.terminated),
        )  # fmt: skip
        return (inner, after), timestep


def extend(observation: Any, absorbed: Any) -> Array:
    """Observations [..., d] with the entry of the absorbing state, [..., d + 1]; absorbed [...]."""
    absorbed = jnp.asarray(absorbed)[..., None]
    absorbed = jnp.broadcast_to(absorbed, (*observation.shape[:-1], 1))
    return jnp.concatenate([jnp.where(absorbed, 0, observation), absorbed.astype(observation.dtype)], axis=-1)
