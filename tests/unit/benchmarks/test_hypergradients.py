"""The campaign of `bilevax verify hypergradient`: a fixed sample of it, and that it sees what is wrong."""

import numpy as np
import pytest

from benchmarks.judge import hypergradients as campaign
from bilevel import Status
from problems.hypergradients import FAMILIES, case
from problems.hypergradients.exact import digits, exact, minus, norm

KNOWN = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module")
def sample():
    """Rows, equalities and boxes of all kinds in float32, balls in float64; the test of the command has quadratics."""
    chosen = ("mixed", "float32"), ("ball", "float64")
    return [campaign.judged(KNOWN[name], dtype, 1, 60) for name, dtype in chosen]


def test_no_good_word_is_wrong(sample):
    for found in sample:
        assert [one for one in found if one.broken] == []
    mixed, ball = sample
    assert len({one.kind for one in mixed}) >= 8
    # Conditions up to 1e10 in float32, and a third of the draws degenerate: for most, y is not known to one digit.
    assert campaign.row(mixed)["good"] >= 0.3
    assert campaign.row(ball)["good"] >= 0.9
    assert campaign.row([one for one in ball if one.easy])["median_ratio"] <= 200
    unsolvable = [one for one in mixed if "contradiction" in one.kind or "flat" in one.kind]
    assert len(unsolvable) >= 5
    assert not any(one.good for one in unsolvable)


def test_a_face_that_rounding_may_turn_has_no_good_word():
    """Among these are vertices of linear g at 1e25 of its scale, flat faces and multipliers of rounding error."""
    found = campaign.judged(KNOWN["simplex-projected"], "float64", 0, 50, first=190)
    assert [one for one in found if one.broken] == []
    assert campaign.row(found)["good"] >= 0.9


@pytest.mark.parametrize(
    ("family", "dtype", "index", "word"),
    [("simplex-projected", "float32", 37, Status.STALLED), ("box-curved", "float64", 60, Status.WEAKLY_ACTIVE)],
)
def test_what_was_wrong_with_a_good_word(family, dtype, index, word):
    """An entry next to its bound, but for 1.5 times what rounding moves it: y leaves by its own size, or one side."""
    (found,) = campaign.judged(KNOWN[family], dtype, 7, 1, first=index)
    assert not found.broken
    assert found.status == word


def test_a_wrong_answer_is_seen():
    """With another gradient as the right one, each good word is broken."""
    family = KNOWN["free"]._replace(draw=lambda draw: _doubled(KNOWN["free"].draw(draw)))
    found = campaign.judged(family, "float64", 0, 60)
    assert all(one.broken for one in found if one.good)
    assert not campaign.holds(found)


def _doubled(one):
    return one._replace(right=[[2 * p + 1 for p in answer] for answer in one.right])


def test_answers_by_finite_differences():
    """The exact gradient of a free quadratic against differences of F, whose lower level is solved exactly, too."""
    one = case(KNOWN["free"], "float64", 0, 3)
    f, g, x = one.data.f, one.data.g, one.data.x.astype(float)

    def F(x):
        y = np.linalg.solve((g.H + g.H.T) / 2, -(g.G @ x + g.h))
        return y @ f.P @ y / 2 + x @ f.Q @ y + f.p @ y + f.s @ x + f.r * (x @ x) / 2

    step = 1e-4 * np.linalg.norm(x)
    differences = [(F(x + step * e) - F(x - step * e)) / (2 * step) for e in np.eye(len(x))]
    with digits():
        off, size = norm(minus(exact(differences), one.right[0])), norm(one.right[0])
    assert off <= exact(1e-6) * size
