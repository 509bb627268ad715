"""Which referee a run has, and its default tolerance."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import irl
import problems
from bilevel import diagnostics
from bilevel.diagnostics import BY_VALUE, IMPLICIT, Measurement, Referee, gap
from bilevel.run import referee_of
from bilevel.struct import struct
from irl.deep import control


def upper(x, y, batch):
    return jnp.sum((x - 1) ** 2) + jnp.sum(y**2)


def lower(x, y, batch):
    return jnp.sum((y - x) ** 2)


def problem(**kwargs):
    start = jnp.zeros(1), jnp.zeros(1)
    return bilevel.BilevelProblem(upper, bilevel.Minimize(lower), init=lambda key: start, **kwargs)


BOX = bilevel.Box(-2.0, 2.0)
FREE, BOXED = problem(), problem(y_set=BOX)
CURVED = problem(y_set=BOX, coupling=bilevel.SmoothCoupling(lambda x, y: y**2 - x))


def still(problem, x, y):
    """A measure of one's own: stationary, whatever x."""
    zero = jnp.zeros(())
    return Measurement(upper(x, y, None), zero, zero, zero, zero, jnp.array(bilevel.Status.ESTIMATED))


@pytest.mark.parametrize(
    ("where", "solver", "referee"),
    [
        (FREE, bilevel.SOBA(), IMPLICIT),
        (BOXED, bilevel.DSBLO(), IMPLICIT),
        (CURVED, bilevel.BLOCC(), BY_VALUE),
        (FREE, bilevel.SampledPenalty(), IMPLICIT),
        (BOXED, bilevel.SampledPenalty(), BY_VALUE),
        (BOXED, bilevel.MEHA(), BY_VALUE),
        (FREE, bilevel.MEHA(), IMPLICIT),
        (BOXED, bilevel.BVFSM(), BY_VALUE),
        (CURVED, bilevel.SampledPenalty(), BY_VALUE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_referee_of_a_problem_and_a_solver(where, solver, referee):
    assert referee_of(where, solver) is referee


def test_the_referee_of_a_control_problem_is_the_solvers():
    shown = irl.Demonstrations.of(np.zeros((1, 2, 4)), [[0, 1]], last=np.zeros((1, 4)), terminated=[True])
    where = irl.to_control(irl.make("CartPole-v1"), shown)
    assert referee_of(where, irl.GAIL()) is control.REFEREE
    assert control.REFEREE.check is None


def test_what_is_asked_for_comes_first():
    mine = Referee("mine", still)
    assert referee_of(BOXED, bilevel.SampledPenalty(), mine) is mine
    assert referee_of(BOXED, bilevel.SampledPenalty(), IMPLICIT) is IMPLICIT
    assert referee_of(FREE, bilevel.SOBA(), still).measure is still


def test_a_function_that_a_referee_measures_by_stands_for_it():
    assert diagnostics.as_referee(gap.measure_global) is BY_VALUE
    assert diagnostics.as_referee(diagnostics.measure) is IMPLICIT
    assert diagnostics.as_referee(still) == diagnostics.as_referee(still)
    assert hash(diagnostics.as_referee(still)) == hash(diagnostics.as_referee(still))


@pytest.mark.parametrize(
    ("referee", "dtype", "tol"),
    [
        (IMPLICIT, "float64", 2.0**-26), (IMPLICIT, "float32", 2.0**-11.5),
        (BY_VALUE, "float64", 2.0**-10.4), (BY_VALUE, "float32", 2.0**-4.6),
    ],
)  # fmt: skip
def test_default_tolerances(referee, dtype, tol):
    assert referee.default_tol({"x": jnp.zeros(3, dtype)}) == pytest.approx(tol, rel=1e-6)


def test_the_finest_dtype_of_x_counts():
    assert IMPLICIT.default_tol((jnp.zeros(2, "float32"), jnp.zeros(2))) == 2.0**-26


def test_a_run_has_the_tolerance_and_the_numbers_of_its_referee(key):
    run = functools.partial(bilevel.solve, FREE, bilevel.SOBA(), key=key, max_steps=1, progress=False)
    assert run(measure=Referee("mine", still, 0.25)).stats["tol"] == 2.0**-13
    solution = run(measure=still)
    assert solution.stats["tol"] == run().stats["tol"] == 2.0**-26
    assert solution.status == bilevel.Status.CONVERGED
    assert solution.record["hypergradient"].tolist() == [0.0]
    with pytest.raises(bilevel.InvalidInput, match="measure: got str"):
        run(measure="by value")  # pyright: ignore[reportArgumentType]


@struct
class Stranger(bilevel.SOBA):
    """A solver of version 0.1.0, with a referee of its own."""

    referee = staticmethod(still)  # pyright: ignore


@struct
class ManyMinimisers(bilevel.SampledPenalty):
    """A solver of version 0.1.0."""

    many_minimisers = True

    def referee(self, problem):
        return None


def test_the_members_of_the_last_version_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"Stranger\.referee is a function.*define the method referee"):
        assert referee_of(FREE, Stranger()).measure is still
    with pytest.warns(DeprecationWarning, match=r"ManyMinimisers\.many_minimisers.*define the method referee"):
        assert referee_of(BOXED, ManyMinimisers()) is BY_VALUE
    with pytest.warns(DeprecationWarning, match="many_minimisers"):
        assert referee_of(FREE, ManyMinimisers()) is IMPLICIT


def test_an_instance_carries_its_referee():
    instance = problems.make("nonconvex")
    assert instance.referee is BY_VALUE
    assert problems.make("quadratic", dim_x=2, dim_y=2).referee is IMPLICIT
    with pytest.warns(DeprecationWarning, match=r"referee=bilevel\.diagnostics\.Referee"):
        old = problems.Instance(instance.problem, measure=gap.measure_global)  # pyright: ignore
    assert old.referee is BY_VALUE
    with pytest.warns(DeprecationWarning, match=r"Instance\.referee\.measure"):
        assert old.measure is gap.measure_global


@pytest.mark.parametrize(
    ("name", "value"),
    [("tol", np.inf), ("tol", "small"), ("max_steps", 10**11), ("max_steps", True), ("every", 2.0), ("every", 0)],
)
def test_numbers_without_a_sense_are_named(name, value, key):
    with pytest.raises(bilevel.InvalidInput, match=f"^{name}: got {value}; expected"):
        bilevel.solve(FREE, bilevel.SOBA(), key=key, **{name: value})


def test_whole_numbers_may_be_of_numpy(key, tmp_path):
    solver = bilevel.AID(num_lower_steps=np.int64(2), lower_step_size=0.1, upper_step_size=0.1)  # pyright: ignore
    assert type(solver.num_lower_steps) is int
    kwargs = {"key": key, "max_steps": np.int64(2), "every": np.int32(1), "checkpoint": tmp_path / "run"}
    solution = bilevel.solve(FREE, solver, **kwargs)
    assert solution.record["step"].tolist() == [0, 1, 2]
