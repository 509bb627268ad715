"""Two calls of LAPACK, one after the other."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.backend.order import after


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 3.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_value_is_the_later_one_whatever_the_earlier_one_is(bad, dtype):
    later = jnp.array([1.0, -2.0, 1e-30], dtype)
    found = jax.jit(after)(later, jnp.asarray(bad, dtype))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, later)


def waits(text):
    """Whether, in a compiled program's text, one call of LAPACK takes what another one gave."""
    operands = {}
    for name, rest in re.findall(r"^\s*(?:ROOT )?%([\w.-]+) = (.*)$", text, re.MULTILINE):
        operands[name] = re.findall(r"%([\w.-]+)", rest)
    calls = re.findall(r"^\s*(?:ROOT )?%([\w.-]+) = .*custom-call.*lapack", text, re.MULTILINE)
    assert len(calls) == 2

    def reaches(name, goal, seen):
        below = [other for other in operands.get(name, ()) if other not in seen]
        seen.update(below)
        return goal in below or any(reaches(other, goal, seen) for other in below)

    one, two = calls
    return reaches(one, two, set()) or reaches(two, one, set())


def values(A, B, tie):
    first = jnp.linalg.svd(A, compute_uv=False)
    second = jnp.linalg.svd(after(B, first[0, 0]) if tie else B, compute_uv=False)
    return first, second


@pytest.mark.parametrize("tie", [False, True])
def test_the_compiler_does_not_see_through_it(tie):
    A = jnp.ones((4, 3, 5))
    text = jax.jit(values, static_argnums=2).lower(A, A + 1, tie).compile().as_text()
    assert waits(text) == tie
