"""Solvers by linear constraints of a strongly convex lower level: implicit gradients through the active rows."""
