"""What every problem of imitation is: a `BilevelProblem` whose parts have names.

`irl.to_bilevel` makes a `TabularImitation`, `irl.to_control` a `ControlImitation`. A solver that knows nothing of
decisions sees f, T and their data, as of any other problem; those of `irl.solvers` read the parts.
"""

import dataclasses
from typing import Any, ClassVar

import jax

from bilevel.backend import sharding
from bilevel.problem import BilevelProblem
from bilevel.solver import Solver
from bilevel.struct import struct


@struct
class ImitationProblem(BilevelProblem):
    """A reward with parameters x, whose agent y(x) is to act as the demonstrations do. Its two kinds say the rest.

    f, the lower level and the data of both levels follow from the parts: `dataclasses.replace(problem, reward=…)` is
    the problem with another reward at both levels.

    Args:
        reward: r(s, a; x), a pytree.
        demonstrations: what the expert did.
    """

    _: dataclasses.KW_ONLY
    reward: Any
    demonstrations: Any

    made_by: ClassVar[str]
    """The function that makes such problems, as users call it."""
    parts: ClassVar[tuple[str, ...]]
    """The fields whose arrays are data, which `solve(..., mesh=...)` splits over devices."""

    def on_mesh(self, mesh: jax.sharding.Mesh | None) -> "ImitationProblem":
        """The same problem with the arrays of its parts split over the devices of `mesh`; None: itself."""
        if mesh is None:
            return self
        data = {name: getattr(self, name) for name in self.parts}
        rest = sharding.place(dataclasses.replace(self, **dict.fromkeys(data)), mesh)
        return dataclasses.replace(rest, **sharding.place_data(data, mesh))


def refuse_others(solver: Solver, problem: BilevelProblem, kind: type[ImitationProblem]) -> str | None:
    """Why a solver for problems of one kind does not take this one; None where it does."""
    if isinstance(problem, kind):
        return None
    lower = type(problem.lower).__name__
    return (
        f"{type(solver).__name__} needs a problem of imitation learning, made by {kind.made_by}; "
        f"got a {type(problem).__name__} with lower level {lower}."
    )
