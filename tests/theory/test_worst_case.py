"""Exact worst cases of first-order methods, from semidefinite programs, around what is published and what is found."""

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own code warns on import
    pytest.importorskip("PEPit", reason="PEPit, of the extra `peers`, computes the exact worst cases")

from benchmarks.peers import pepit


@pytest.mark.parametrize("name", list(pepit.METHODS))
def test_exact_worst_cases_are_below_what_is_published(name):
    """And equal to it for the first and the third, whose rates are attained."""
    method = pepit.METHODS[name]
    for mu, steps in ((0.1, 1), (0.01, 3)):
        exact, published = method.exact(mu, steps), method.published(mu, steps)
        assert exact <= published * (1 + pepit.TOLERANCE)
        if method.measure == "|x_k - x*|":
            assert exact == pytest.approx(published, rel=pepit.TOLERANCE)
        else:
            assert exact < 0.995 * published


def test_the_search_comes_near_the_exact_worst_case_and_never_above_it():
    """Nesterov's method, whose published bound is a quarter too large."""
    case = pepit.case("accelerated, step 1/L", 10.0, 2, examples=100)
    assert case.ordered
    assert 0.97 * case.exact <= case.found
    assert case.published > 1.3 * case.exact
