"""Lower levels drawn at random, with their hypergradients in exact arithmetic: `bilevax verify hypergradient`."""

import numpy as np

from bilevel.lower import ProjectedNewton
from problems.hypergradients import balls, entropies, kinds, smooth
from problems.hypergradients.draws import Case, Draw, Family, Unsolved
from problems.hypergradients.exact import digits

FAMILIES = [*smooth.FAMILIES, *kinds.families(ProjectedNewton()), *balls.FAMILIES, *entropies.FAMILIES]


def case(family: Family, dtype: str, seed: int, index: int) -> Case:
    """The draw number `index` of a family in "float32" or "float64", whatever the others are."""
    spot = [one.name for one in FAMILIES].index(family.name)
    with digits():
        for attempt in range(1000):
            rng = np.random.default_rng([seed, spot, {"float32": 32, "float64": 64}[dtype], index, attempt])
            try:
                return family.draw(Draw(rng, dtype, family.n))
            except Unsolved:
                continue
    raise Unsolved(f"{family.name}: nothing was drawn that has a reference")


__all__ = ["FAMILIES", "Case", "Family", "case"]
