"""Solvers for strongly convex lower levels with linear constraints: implicit gradients through the active rows.

The lower level is solved by an active-set method; one lower step (T = 1) is exact where g is quadratic. With n = dim y
a step takes n products for the Hessian, and none where `Minimize(g, diagonal=...)` gives it on a box.
"""
