"""Solvers by the implicit function theorem: a linear system, its series, or reverse mode through the lower steps.

The lower level is unconstrained and strongly convex in y, or a contraction T. Q is the number of steps or products for
the adjoint v.
"""
