"""Solvers by the implicit function theorem: a linear system, its series, or reverse mode through the lower steps."""
