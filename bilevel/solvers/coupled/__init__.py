"""Solvers for lower levels with constraints h(x, y) <= 0, convex in y: Lagrangians, by gradients alone.

Gradients of h, as many as of g, are not counted.
"""
