"""Solvers without an adjoint: a penalty or a barrier on the lower value gap, by gradients alone, or on the residual.

The multiplier of a step is lam, or c where it grows with the step k.
"""
