"""Problems of imitation: their parts are fields, and the two levels follow from them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import irl
from bilevel.backend import sharding
from bilevel.run.checkpoint import fingerprint

S, A = 4, 2


def make(seed=0, **settings):
    rng = np.random.default_rng(seed)
    mdp = irl.MDP.dense(rng.dirichlet(np.ones(S), (S, A)), rng.dirichlet(np.ones(S)), 0.9)
    reward = irl.LinearReward.of(rng.normal(size=(S, A, 3)))
    shown = irl.Demonstrations.of(rng.integers(S, size=(6, 5)), rng.integers(A, size=(6, 5)))
    return irl.to_bilevel(mdp, shown, reward, **settings)


def value(problem, x=(1.0, -2.0, 0.5)):
    """(f, T) at a fixed (x, y)."""
    x, y = jnp.asarray(x), jnp.ones((S, A))
    f = problem.upper(x, y, problem.upper_data.full())
    return f, problem.lower.T(x, y, problem.lower_data.full())


@pytest.mark.parametrize("objective", ["likelihood", "surrogate"])
@pytest.mark.parametrize("batch_size", [None, 2])
class TestTabular:
    def test_another_part_changes_both_levels(self, objective, batch_size):
        problem, other = (make(seed, objective=objective, batch_size=batch_size).validate() for seed in (0, 1))
        names = "mdp", "reward", "demonstrations"
        moved = dataclasses.replace(problem, **{name: getattr(other, name) for name in names})
        for found, expected in zip(value(moved), value(other), strict=True):
            np.testing.assert_array_equal(found, expected)
        with pytest.raises(ValueError, match=r"lower_data .*init=False"):
            dataclasses.replace(problem, lower_data=bilevel.Full())

    def test_every_array_is_one_leaf(self, objective, batch_size):
        leaves = jax.tree.leaves(make(objective=objective, batch_size=batch_size))
        assert len({id(leaf) for leaf in leaves}) == len(leaves)

    def test_all_of_the_data_and_a_mesh_change_no_value(self, objective, batch_size):
        problem = make(objective=objective, batch_size=batch_size)
        with sharding.on(jax.make_mesh((1,), ("data",))) as mesh:
            for same in (problem.on_full_data(), problem.on_mesh(mesh)):
                assert isinstance(same, irl.TabularImitation)
                for found, expected in zip(value(same), value(problem), strict=True):
                    np.testing.assert_array_equal(found, expected)
        assert problem.on_full_data().upper_data.fraction == 1
        np.testing.assert_array_equal(problem.on_full_data().occupancy(), problem.occupancy())

    def test_a_fingerprint_is_of_the_parts(self, objective, batch_size):
        problem, same, other = (make(seed, objective=objective, batch_size=batch_size) for seed in (0, 0, 1))
        assert fingerprint(problem) == fingerprint(same)
        assert fingerprint(problem) != fingerprint(other)
        assert fingerprint(problem) != fingerprint(dataclasses.replace(problem, reward=other.reward))


def test_a_second_instance_is_not_traced_again():
    traced = []

    @jax.jit
    def of(problem):
        traced.append(problem)
        return value(problem)

    for seed in range(3):
        of(make(seed))
    of(make(0, objective="surrogate"))
    assert len(traced) == 2


def test_bounds_of_x_may_be_infinite():
    """A set is no datum: only the parts are checked for finite numbers."""
    make(x_set=bilevel.Box(-jnp.inf, 1.0)).validate()
    broken = make()
    broken = dataclasses.replace(broken, reward=irl.LinearReward(jnp.full((S, A, 3), jnp.nan)))
    with pytest.raises(bilevel.InvalidInput, match=r"lower_data.*reward.features.*non-finite"):
        broken.validate()


def test_solvers_ask_for_the_kind_and_not_for_functions():
    """A plain problem with the same two levels has no parts; general solvers take both."""
    problem = make()
    plain = bilevel.BilevelProblem(
        problem.upper, problem.lower, upper_data=problem.upper_data, lower_data=problem.lower_data, init=problem.init
    )
    assert "made by irl.to_bilevel; got a BilevelProblem" in irl.MLIRL().unsupported(plain)
    assert irl.MLIRL().unsupported(problem) is None
    for solver in (bilevel.AID(), bilevel.SOBA()):
        assert solver.unsupported(plain) is None
        assert solver.unsupported(problem) is None
