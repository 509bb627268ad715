"""Steps of x along the edge of {x in X : Y(x) is not empty}."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel.sampled import Blocks
from bilevel.sampled.feasible import restore_all
from bilevel.sampled.line_search import Place, arrive
from bilevel.sampled.penalised import Form, Penalised
from bilevel.sampled.renewal import Samples


def total(x, y, batch):
    return jnp.sum(x) + jnp.sum(y)


def start(key):
    return jnp.full(2, 0.5), jnp.zeros(1)


def test_a_step_ends_at_the_nearest_point_of_the_domain():
    """0 <= y <= 1/2 - x_1 + x_2 is empty where x_1 - x_2 > 1/2. From (1, -1/2) the nearest point is (1/2, 0). From
    (1, 0), which is the point of X = [0, 1]^2 nearest to that, it would be (3/4, 1/4): off to where F is larger.
    """
    unit, one = bilevel.Box(0.0, 1.0), jnp.ones((1, 1))
    rows = bilevel.LinearCoupling(one, jnp.array([[1.0, -1.0]]), jnp.array([0.5]))
    problem = bilevel.BilevelProblem(total, bilevel.Minimize(total), unit, unit, rows, init=start)

    @jax.jit
    def ends(x, goal):
        view = Blocks.of(problem, jnp.zeros(1))
        P = Penalised(view, Form(joint=False, entropic=True, frozen=False), jnp.array(10.0), jnp.array(1.0), 64)
        points, _, held, lift = restore_all(view, x, jnp.linspace(0, 1, 8)[:, None, None])
        f, g = view.values(x, points)
        found = P.at(f, g)
        direction = P.gradient(x, Samples(points, f, g, held), lift[:4], found)
        here = Place(x, points, f, g, found.value, jnp.array(False))
        return arrive(P, here, direction, goal, points[-1], 4)

    for goal, right in (([1.0, -0.5], [0.5, 0.0]), ([2.0, 1.0], [1.0, 1.0]), ([0.6, 0.0], [0.55, 0.05])):
        found = ends(jnp.array([0.5, 0.1]), jnp.array(goal))
        np.testing.assert_allclose(found.x, right, atol=1e-4)
        assert not found.outside
