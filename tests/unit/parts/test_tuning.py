"""Default step sizes on strongly coupled quadratics, where f is concave in x alone: exact iteration matrices."""

from functools import partial

import jax
import numpy as np
import pytest

import problems
from bilevel.parts.tuning import default_steps

FAMILIES = ({"coupling": 2.0}, {"coupling": 5.0}, {"coupling": 2.0, "condition_y": 100.0}, {"condition_y": 1000.0})
steps = jax.jit(default_steps, static_argnums=3)


def matrices(problem):
    P, Q, S, *_ = (np.asarray(leaf).mean(axis=0) for leaf in problem.upper_data.full())
    H, G, _ = (np.asarray(leaf).mean(axis=0) for leaf in problem.lower_data.full())
    return P, Q, S, H, G


def at_once(a, c, P, Q, S, H, G):
    """The matrix of a step of SOBA in (y, v, x)."""
    nought = np.zeros_like(H)
    moves = np.block([[-a * H, nought, -a * G.T], [a * P, -a * H, a * Q.T], [-c * Q, c * G, -c * S]])
    return np.eye(len(moves)) + moves


def nested(T, a, c, P, Q, S, H, G):
    """The matrix of a step of AmIGO with T steps each in y and in v."""
    shrink = np.linalg.matrix_power(np.eye(len(H)) - a * H, T)
    gain = np.linalg.solve(H, np.eye(len(H)) - shrink)
    y = np.hstack([shrink, np.zeros_like(H), -gain @ G.T])
    v = np.hstack([np.zeros_like(H), shrink, gain @ Q.T]) + gain @ P @ y
    x = np.hstack([np.zeros((len(S), 2 * len(H))), np.eye(len(S)) - c * S]) - c * Q @ y + c * G @ v
    return np.vstack([y, v, x])


def radius(matrix):
    return np.abs(np.linalg.eigvals(matrix)).max()


@pytest.mark.parametrize(("T", "matrix"), [(0, at_once), (10, partial(nested, 10))], ids=["at once", "nested"])
def test_default_steps_are_stable_with_room_to_spare_and_not_timid(T, matrix):
    for family in FAMILIES:
        for seed in range(3):
            problem = problems.make("quadratic", seed=seed, dim_x=4, dim_y=5, **family).problem
            a, c = map(float, steps(problem, *problem.init(jax.random.key(seed)), T))
            assert radius(matrix(a, 2 * c, *matrices(problem))) < 1, (family, seed)
            if family.get("coupling", 0) >= 5 and T == 0:
                assert radius(matrix(a, 30 * c, *matrices(problem))) > 1, (family, seed)
