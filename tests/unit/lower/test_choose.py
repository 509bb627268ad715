"""Which method a lower level gets, what is refused, and y taken as given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import (
    CG,
    ActiveSet,
    AsGiven,
    Ball,
    Box,
    FixedPoint,
    LinearCoupling,
    Minimize,
    Newton,
    Polyhedron,
    ProjectedNewton,
    Reals,
    Simplex,
    Status,
    diagnostics,
    lower,
)

N, MANY = 3, 300
CURVATURE = jnp.linspace(1.0, 4.0, N)


def f(x, y, batch):
    return 0.5 * jnp.sum((y - 1) ** 2)


def g(x, y, batch):
    return 0.5 * jnp.sum(y**2) - jnp.sum(x) * jnp.sum(y)


def bent(x, y, batch):
    """The minimiser is x/CURVATURE."""
    return 0.5 * jnp.sum(CURVATURE * y**2) - x @ y


def scales(x, y, batch):
    return jnp.ones_like(y)


def make(level=None, n=N, **kwargs):
    start = lambda key: (jnp.zeros(N), jnp.zeros(n))  # noqa: E731
    return bilevel.BilevelProblem(f, Minimize(g) if level is None else level, init=start, **kwargs)


ROW = LinearCoupling(jnp.ones((1, N)), jnp.ones((1, N)), jnp.ones(1))
CHOICES = {
    "no constraints": (make(), Newton),
    "no constraints, given diagonal": (make(Minimize(g, scales)), Newton),
    "no constraints, many unknowns": (make(n=MANY), ProjectedNewton),
    "fixed point": (make(FixedPoint(lambda x, y, batch: 0.5 * y + x)), Newton),
    "fixed point, many unknowns": (make(FixedPoint(lambda x, y, batch: 0.5 * y), n=MANY), Newton),
    "box": (make(y_set=Box(0.0, 1.0)), ActiveSet),
    "box, many unknowns": (make(y_set=Box(0.0, 1.0), n=MANY), ProjectedNewton),
    "box, given diagonal": (make(Minimize(g, scales), y_set=Box(0.0, 1.0)), ProjectedNewton),
    "simplex": (make(y_set=Simplex()), ActiveSet),
    "ball": (make(y_set=Ball(1.0)), ProjectedNewton),
    "polyhedron": (make(y_set=Polyhedron(jnp.eye(N), jnp.ones(N))), ActiveSet),
    "coupling": (make(coupling=ROW), ActiveSet),
    "coupling, many unknowns": (
        make(coupling=LinearCoupling(jnp.ones((1, MANY)), jnp.ones((1, N)), jnp.ones(1)), n=MANY), ActiveSet,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_each_kind_of_level_gets_its_method(name):
    problem, kind = CHOICES[name]
    y = problem.init(jax.random.key(0))[1]
    assert type(lower.choose(problem, y)) is kind
    chosen = lower.choose(problem, y, Newton(tol=1e-3))
    assert type(chosen) is kind
    assert chosen.tol == 1e-3
    assert isinstance(chosen, lower.LowerMethod)


@pytest.mark.parametrize(
    ("problem", "asked"),
    [
        (make(), ProjectedNewton(tol=1e-5)),
        (make(), AsGiven()),
        (make(n=MANY), AsGiven()),
        (make(y_set=Box(0.0, 1.0)), ProjectedNewton()),
        (make(y_set=Box(0.0, 1.0), n=MANY), ActiveSet(max_steps=7)),
        (make(y_set=Reals()), Newton(dense=False)),
        (make(n=MANY), Newton(dense=True)),
    ],
)
def test_what_is_asked_for_is_taken(problem, asked):
    assert lower.choose(problem, problem.init(jax.random.key(0))[1], asked) is asked


CALLS = {
    "hypergradient": lambda problem, **kw: bilevel.hypergradient(problem, jnp.zeros(N), **kw),
    "implicit_objective": lambda problem, **kw: bilevel.implicit_objective(problem, **kw)(jnp.zeros(N)),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_method_is_named(call):
    for wrong, got in ((0.1, "0.1 of type float"), (Newton, "the class Newton"), (CG(), "of type CG")):
        with pytest.raises(bilevel.InvalidInput, match=rf"(?s)lower \({call}\): got .*{got}; expected a LowerMethod"):
            CALLS[call](make(), lower=wrong)
    for wrong, got in (("cg", "'cg' of type str"), (CG, "the class CG"), (Newton(), "of type Newton")):
        with pytest.raises(bilevel.InvalidInput, match=rf"(?s)method \({call}\): got .*{got}; expected a linear solv"):
            CALLS[call](make(), method=wrong)
    with pytest.raises(bilevel.InvalidInput, match=rf"lower \({call}\): got ActiveSet; expected Newton"):
        CALLS[call](make(), lower=ActiveSet())


def test_unrolling_is_no_method_for_the_objective():
    with pytest.raises(bilevel.InvalidInput, match=r"(?s)method \(implicit_objective\).*Unrolled"):
        bilevel.implicit_objective(make(), method=bilevel.Unrolled(0.1))


def test_solve_names_what_is_no_method():
    with pytest.raises(bilevel.InvalidInput, match=r"lower \(lower.solve\): got 'newton' of type str"):
        lower.solve(make(), jnp.zeros(N), jnp.zeros(N), None, "newton")


@pytest.mark.parametrize("call", CALLS)
def test_what_is_not_supported_is_named(call):
    box, mixed = make(y_set=Box(0.0, 1.0)), make(y_set=Ball(1.0), coupling=ROW)
    with pytest.raises(NotImplementedError, match=rf"{call}: lower=AsGiven\(\) has no meaning"):
        CALLS[call](box, lower=AsGiven())
    with pytest.raises(NotImplementedError, match=rf"{call}: y_set must be .*got Ball"):
        CALLS[call](mixed, lower=ActiveSet())
    for problem in (box, make(y_set=Ball(1.0))):
        with pytest.raises(NotImplementedError, match=rf"{call}: method must be None"):
            CALLS[call](problem, method=CG())


def test_every_call_takes_none_for_the_default_but_the_two_that_warn():
    problem, x, y = make(Minimize(bent)), jnp.ones(N), jnp.full(N, 5.0)
    solved = lower.solve(problem, x, y, None)
    np.testing.assert_allclose(solved.y, 1 / CURVATURE, rtol=1e-14)
    F = bilevel.implicit_objective(problem, lower=None)
    np.testing.assert_allclose(F(x, y), f(x, solved.y, None), rtol=1e-14)
    given = bilevel.hypergradient(problem, x, y, lower=AsGiven())
    np.testing.assert_array_equal(given.y, y)
    with pytest.warns(DeprecationWarning, match=r"hypergradient: lower=None takes y as given; write lower=AsGiven\(\)"):
        old = bilevel.hypergradient(problem, x, y, lower=None)
    jax.tree.map(np.testing.assert_array_equal, old, given)
    with pytest.warns(DeprecationWarning, match=r"measure: lower=None takes y as given"):
        old = diagnostics.measure(problem, x, y, lower=None)
    jax.tree.map(np.testing.assert_array_equal, old, diagnostics.measure(problem, x, y, lower=AsGiven()))


def test_as_given():
    """At y off by d: with v = (y - 1)/c, the gradient is y - 1 over c, and |R| = |c d|."""
    problem, x, d = make(Minimize(bent)), jnp.ones(N), jnp.full(N, 0.1)
    y = x / CURVATURE + d
    found = AsGiven().solve(problem, x, y, None)
    np.testing.assert_allclose(found.residual, jnp.linalg.norm(CURVATURE * d), rtol=1e-12)
    assert found.steps == 0
    h = bilevel.hypergradient(problem, x, y, lower=AsGiven())
    assert h.status == Status.ESTIMATED
    np.testing.assert_allclose(h.gradient, (y - 1) / CURVATURE, rtol=1e-12)
    error = jnp.linalg.norm(d / CURVATURE)
    assert error <= h.error_bound <= 3.1 * error  # three times, and rounding
    F = bilevel.implicit_objective(problem, lower=AsGiven())
    np.testing.assert_allclose(F(x, y), h.value, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(F)(x, y), h.gradient, rtol=1e-12)


def test_projected_newton_without_constraints_has_an_objective():
    problem, x = make(Minimize(bent)), jnp.ones(N)
    F = bilevel.implicit_objective(problem, lower=ProjectedNewton())
    h = bilevel.hypergradient(problem, x, lower=ProjectedNewton())
    np.testing.assert_allclose(jax.grad(F)(x), (x / CURVATURE - 1) / CURVATURE, rtol=1e-12)
    np.testing.assert_allclose(h.gradient, (x / CURVATURE - 1) / CURVATURE, rtol=1e-12)


def test_a_method_of_ones_own():
    """Whatever implements the protocol is a lower method, here a closed form."""

    class Closed(Newton):
        def solve(self, problem, x, y, batch):
            return AsGiven().solve(problem, x, x / CURVATURE, batch)

    problem, x = make(Minimize(bent)), jnp.ones(N)
    found = lower.solve(problem, x, jnp.zeros(N), None, bilevel.struct.struct(Closed)())
    np.testing.assert_allclose(found.residual, 0, atol=1e-15)
    np.testing.assert_array_equal(found.y, x / CURVATURE)


def test_the_settings_that_a_solution_keeps_are_a_method():
    problem = make(Minimize(bent), y_set=Box(0.0, 0.5))
    x = jnp.ones(N)
    found = jax.jit(lower.polyhedral.solve)(problem, x, jnp.zeros(N), None)
    with pytest.warns(DeprecationWarning, match="warm=Warm"):
        kept = found.kept()
    with pytest.warns(DeprecationWarning, match="warm=Warm"):
        again = bilevel.hypergradient(problem, x, found.y, lower=kept)
    np.testing.assert_allclose(again.gradient, bilevel.hypergradient(problem, x).gradient, rtol=1e-12)
    assert dataclasses.is_dataclass(kept)
