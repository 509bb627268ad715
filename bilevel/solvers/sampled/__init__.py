"""Solvers by lower levels with many minimisers, by samples of Y."""
