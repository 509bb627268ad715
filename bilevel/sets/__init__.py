"""The closed convex sets that x and y may be confined to: `basic` ones, and `smooth` ones and intersections."""

from bilevel.sets.basic import Ball, Box, Polyhedron, Product, Reals, Set, Simplex
from bilevel.sets.smooth import Intersection, SmoothSet

__all__ = ["Ball", "Box", "Intersection", "Polyhedron", "Product", "Reals", "Set", "Simplex", "SmoothSet"]
