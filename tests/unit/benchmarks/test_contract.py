"""The contract's checks find what they look for."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import bilevel
from benchmarks.judge import contract, solver_check
from bilevel.record import OracleCount
from bilevel.struct import static, struct


@struct(kw_only=True)
class Dearer(bilevel.SOBA):
    """SOBA that declares one product too few."""

    def cost(self, problem):
        return OracleCount(upper_gradients=1, lower_gradients=1, jvps=1)


@struct(kw_only=True)
class Clocked(bilevel.SOBA):
    """SOBA whose step is not what it is without jit, since tracing happens once."""

    def step(self, problem, state, key):
        state, info = super().step(problem, state, key)
        shift = 0.0 if isinstance(state.x, jax.core.Tracer) else 1e-3
        return state._replace(x=jax.tree.map(lambda leaf: leaf + shift, state.x)), info


@struct(kw_only=True)
class Outside(bilevel.SOBA):
    """SOBA without its projection."""

    def step(self, problem, state, key):
        return super().step(dataclasses.replace(problem, x_set=bilevel.Reals()), state, key)


@pytest.fixture(scope="module")
def problem():
    quadratic = solver_check.instances()["batches"].problem
    return dataclasses.replace(quadratic, x_set=bilevel.Box(-0.1, 0.1))


def test_what_is_declared_and_called_is_told_apart(problem, key):
    with pytest.raises(contract.Broken, match="hvps 0, 1"):
        contract.jit_and_cost(problem, Dearer(lower_step_size=0.05, linear_step_size=0.05, upper_step_size=0.05), key)


def test_another_step_without_jit_is_seen(problem, key):
    with pytest.raises(contract.Broken, match=r"under jit and one without differ in .*x.* by 0\.001"):
        contract.jit_and_cost(problem, Clocked(lower_step_size=0.05, linear_step_size=0.05, upper_step_size=0.05), key)


def test_leaving_the_upper_set_is_seen(problem, key):
    solver = Outside(lower_step_size=0.3, linear_step_size=0.3, upper_step_size=0.3)
    with pytest.raises(contract.Broken, match="outside of X"):
        contract.respects_the_upper_set(problem, solver, key)


def test_words_and_fields_are_looked_at():
    with pytest.raises(contract.Broken, match="lacks Assumptions:, Cost per step:"):
        contract.documented(Dearer)

    @struct(kw_only=True)
    class Counting(bilevel.SOBA):
        loops: int = 3
        choice: str = static(default="a")

    with pytest.raises(contract.Broken, match="leaves hold 3; make loop lengths"):
        contract.numbers_are_leaves(Counting())


def test_trees_that_differ_say_where():
    contract.same("two", {"a": jnp.array([1.0, jnp.nan])}, {"a": jnp.array([1.0, jnp.nan])})
    with pytest.raises(contract.Broken, match=r"two differ in \['a'\] by 1"):
        contract.same("two", {"a": jnp.zeros(2)}, {"a": jnp.ones(2)})
    with pytest.raises(contract.Broken, match="PyTreeDef"):
        contract.same("two", {"a": jnp.zeros(2)}, {"b": jnp.zeros(2)})


class Bare(bilevel.SOBA):
    """A class that JAX does not know the fields of."""


def test_a_class_without_its_decorator_is_named(problem, key):
    with pytest.raises(bilevel.InvalidInput, match=r"solver: got Bare, .*struct\.struct"):
        bilevel.solve(problem, Bare(), key=key)
    (check,) = solver_check.check(Bare)
    assert (check.name, check.verdict) == ("pytree", "fault")
