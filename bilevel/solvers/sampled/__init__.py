"""Solvers for lower levels with many minimisers, on a bounded Y or Y(x), which they draw points of."""
