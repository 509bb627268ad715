"""Building blocks of solvers: step sizes, iterates, descent, tracking of active sets, Lagrangians, estimators."""
