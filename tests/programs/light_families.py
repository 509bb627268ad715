"""Importing `problems` imports no family, and making the families known imports neither scikit-learn nor flax."""

import sys

import problems

assert "problems.ridge" not in sys.modules
problems.families()
assert "problems.ridge" in sys.modules
heavy = {"sklearn", "flax", "matplotlib", "cvxpy"} & set(sys.modules)
assert not heavy, heavy
