"""Solvers of inverse reinforcement learning, one algorithm per file, found as `bilevel.solvers` finds its own."""

from bilevel.solvers import discover

ALL = discover(__name__)
globals().update(ALL)
__all__ = list(ALL)  # pyright: ignore[reportUnsupportedDunderAll]
