"""One compilation for several stages."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.backend.once import in_turn


def halve(point, request):
    return point / 2 + request


def until_small(point, carry):
    """Repeats itself while the point is above 1; then asks for 10."""
    small = point <= 1
    return jnp.where(small, 10.0, 0.0), {**carry, "first": point, "looks": carry["looks"] + 1}, small


def last(point, carry):
    return jnp.zeros_like(point), {**carry, "last": point}, jnp.array(True)


def run(point):
    nothing = {"first": jnp.zeros(()), "last": jnp.zeros(()), "looks": jnp.array(0)}
    return in_turn(halve, point, jnp.zeros(()), nothing, [until_small, last])


def test_stages_come_in_turn_and_repeat_themselves():
    found = jax.jit(run)(jnp.array(8.0))
    assert found["looks"] == 3
    assert found["first"] == 1
    assert found["last"] == 10.5


def test_under_vmap_each_lane_has_its_own_stage():
    points = jnp.array([8.0, 1.0, 100.0])
    together = jax.jit(jax.vmap(run))(points)
    for k, point in enumerate(points):
        jax.tree.map(lambda many, one, k=k: np.testing.assert_array_equal(many[k], one), together, run(point))


def test_the_function_is_traced_once():
    calls = []

    def counted(point, request):
        calls.append(point)
        return halve(point, request)

    nothing = {"first": jnp.zeros(()), "last": jnp.zeros(()), "looks": jnp.array(0)}
    jax.make_jaxpr(lambda point: in_turn(counted, point, jnp.zeros(()), nothing, [until_small, last]))(jnp.ones(()))
    assert len(calls) == 1
