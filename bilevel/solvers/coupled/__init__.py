"""Solvers by constraints of the lower level that contain x: Lagrangians of both lower problems."""
